"""CIFAR-10's files with random pictures."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from benchmarks.data.cifar10 import FILES, FOLDER


def write_cifar10(root: Path) -> Path:
    """The real layout with 20 pictures a batch."""
    rng = np.random.default_rng(0)
    (root / FOLDER).mkdir()
    for name in (*FILES["train"], *FILES["test"]):
        content = {
            b"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            b"labels": [int(label) for label in rng.permutation(20) % 10],
            b"filenames": [b"a.png"] * 20,
        }
        write(root, name, content)
    return root


def write(root: Path, name: str, content: object, protocol: int = 2) -> None:
    (root / FOLDER / name).write_bytes(pickle.dumps(content, protocol))
