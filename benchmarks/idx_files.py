"""IDX, the format of MNIST and its relatives, plain or gzipped.

    00 00 08 ndim | ndim sizes, each 4 bytes, big endian | the values, unsigned bytes

08 is the type code of unsigned bytes, the only one that these data sets use.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def find_idx(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder, plain or with .gz."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path, ndim: int) -> Tensor:
    """The array as uint8; ValueError with what was expected for a file that is damaged."""
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
