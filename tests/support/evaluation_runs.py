"""What the tests of evaluations ask for, and pictures to compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.evaluation.request import EvaluationRequest
from benchmarks.metrics.distances import Frechet

NUM = 600  # two blocks of 256 and a part of one


def request(out: Path, **changes) -> EvaluationRequest:
    wanted = {"num": NUM, "nfe": (1, 3), "features": ("pixels",), "cache": out / "reference"}
    return EvaluationRequest(**(wanted | changes))


# The real side.


def grey_pictures(folder: Path, n: int = 40) -> tuple[Path, np.ndarray]:
    rng = np.random.default_rng(0)
    folder.mkdir()
    pixels = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return folder, pixels


def fd(samples: torch.Tensor, real: np.ndarray) -> float:
    ((_, value),) = Frechet()(samples, torch.from_numpy(real.reshape(len(real), -1)).float())
    return value


def blocks(out: Path) -> dict[str, torch.Tensor]:
    """Features of all samples, block by block."""
    found = sorted((out / "features").glob("*/block_*.safetensors"))
    return {f"{p.parent.name}/{p.name}": load_file(p)["features"] for p in found}
