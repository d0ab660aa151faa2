"""Fashion-MNIST: grey pictures [1 28 28] in [-1, 1], labels 0 to 9.

Its files have the format IDX, which MNIST introduced, and may be compressed by gzip:

    00 00 08 ndim | ndim sizes, each 4 bytes, big endian | the values, unsigned bytes

The third byte is the type of the values. 08 stands for unsigned bytes; no other type is read.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.streams import Pictures, StoredSet
from registry import datasets


def find_idx(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder, plain or with .gz; None if there is neither."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path, ndim: int) -> Tensor:
    """The array in an IDX file as uint8; ValueError if the file is damaged or has another ndim."""
    content = _unzipped(path)
    magic = bytes((0, 0, 8, ndim))
    start = 4 + 4 * ndim
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{path} is not an IDX file of bytes with {ndim} dimensions: expected a header of "
            f"{start} bytes that starts with {magic.hex(' ')}, found {len(content)} bytes that "
            f"start with {content[:4].hex(' ') or 'nothing'}"
        )
    shape = tuple(np.frombuffer(content, ">u4", count=ndim, offset=4).tolist())
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} is damaged: its header announces {shape}, so {math.prod(shape)} bytes of "
            f"values, but {len(content) - start} follow. Copy or install the file again"
        )
    values = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(values.copy())


def _unzipped(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged: expected a whole gzip file, but unpacking {len(content)} bytes "
            f"failed ({error}). Copy or install the file again"
        ) from error


@datasets.register("fashion_mnist")
@dataclass(frozen=True, kw_only=True)
class FashionMnist(StoredSet):
    """Fashion-MNIST, 28x28 grey pictures of ten kinds of clothes, from its IDX files."""

    name: ClassVar = "fashion_mnist"
    local_paths: ClassVar = ("folder",)
    folder: str = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts it
    split: Literal["train", "test", "all"] = "train"  # 60,000, 10,000 or both

    def load(self) -> Pictures:
        prefixes = {"train": ("train",), "test": ("t10k",), "all": ("train", "t10k")}
        if self.split not in prefixes:
            raise ValueError(
                f"fashion_mnist.split is {self.split!r}; it must be one of {', '.join(prefixes)}"
            )
        parts = [self._load_part(prefix) for prefix in prefixes[self.split]]
        classes = "T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
        return Pictures(
            torch.cat([pixels for pixels, _ in parts])[:, None],
            torch.cat([labels for _, labels in parts]).long(),
            tuple(classes.split(", ")),
        )

    def _load_part(self, prefix: str) -> tuple[Tensor, Tensor]:
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        images, labels = (find_idx(Path(self.folder).expanduser(), name) for name in names)
        if images is None or labels is None:
            raise FileNotFoundError(self._how_to_get(names))
        pixels, classes = read_idx(images, ndim=3), read_idx(labels, ndim=1)
        if pixels.shape[1:] != (28, 28) or len(pixels) != len(classes) or not len(pixels):
            raise ValueError(
                f"{images} holds {tuple(pixels.shape)} pixels and {labels} {len(classes)} labels; "
                "expected n pictures of 28 x 28 and n labels"
            )
        if int(classes.max()) > 9:
            raise ValueError(f"{labels} holds the label {int(classes.max())}; expected 0 to 9")
        return pixels, classes

    def _how_to_get(self, names: tuple[str, ...]) -> str:
        return (
            f"Fashion-MNIST is not in {self.folder!r}: it needs {' and '.join(names)}, each plain "
            "or with .gz. Install it (apt-get install dataset-fashion-mnist), or bind "
            "fashion_mnist.folder to a folder with the four IDX files train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
        )
