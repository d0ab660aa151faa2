"""CIFAR-10: colour pictures [3 32 32] in [-1, 1], labels 0 to 9, from the files that it comes in.

The layout is the one that torchvision unpacks. The files are pickles, and reading a pickle can call
any function. Here only the few functions are allowed that build a NumPy array; a file that asks for
another one is refused, and the error names that function.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from benchmarks.data.streams import Pictures, StoredSet
from registry import datasets

FOLDER = "cifar-10-batches-py"
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_HARMLESS = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


@datasets.register("cifar10")
@dataclass(frozen=True, kw_only=True)
class Cifar10(StoredSet):
    """CIFAR-10, 32x32 colour pictures of ten kinds of things, from its Python batches."""

    name: ClassVar = "cifar10"
    local_paths: ClassVar = ("folder",)
    folder: str = "data"  # the folder that holds cifar-10-batches-py, or that folder itself
    split: Literal["train", "test", "all"] = "train"  # 50,000, 10,000 or both
    flip: bool = False  # mirror half of the training samples left to right

    def load(self) -> Pictures:
        splits = {**FILES, "all": FILES["train"] + FILES["test"]}
        if self.split not in splits:
            raise ValueError(f"cifar10.split is {self.split!r}; it must be one of {[*splits]}")
        root = Path(self.folder).expanduser()
        folder = root / FOLDER if (root / FOLDER).is_dir() else root
        files = [folder / name for name in splits[self.split]]
        if missing := [path.name for path in files if not path.is_file()]:
            raise FileNotFoundError(
                f"CIFAR-10 is not in {str(root)!r}: {', '.join(missing)} missing. Unpack {URL} "
                f"there, so that it holds {FOLDER}/, or bind cifar10.folder to where it is"
            )
        parts = [_read_batch(path) for path in files]
        return Pictures(
            torch.from_numpy(np.concatenate([pixels for pixels, _ in parts])),
            torch.from_numpy(np.concatenate([labels for _, labels in parts])),
            tuple(CLASSES.split()),
        )


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module, name)


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n 3 32 32] and labels int64 [n] of one batch file."""
    with path.open("rb") as file:
        try:
            content = _ArraysOnly(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle raises errors of any kind
            raise ValueError(
                f"{path} is no batch file of CIFAR-10 or is damaged: {error}"
            ) from error
    try:
        found = {key if isinstance(key, str) else key.decode(): content[key] for key in content}
        pixels, labels = found["data"], np.asarray(found["labels"], dtype=np.int64)
        good = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3 * 32 * 32)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no batch file of CIFAR-10: {error!r}") from error
    if not good or not len(labels) or labels.min() < 0 or labels.max() > 9:
        raise ValueError(
            f"{path} holds {pixels.dtype} {pixels.shape} pixels and {len(labels)} labels; expected "
            "uint8 (n, 3072) and n labels from 0 to 9"
        )
    return pixels.reshape(-1, 3, 32, 32), labels
