"""Pixels of pictures: uint8 tensors [channels resolution resolution], values from 0 to 255.

Every picture goes through the same steps:

    1. It is turned upright, as its EXIF orientation says.
    2. It is brought to 8 bits; 16-bit grey v becomes v / 257, rounded.
    3. Where it is transparent, it is laid on white.
    4. Its largest centred square, at whole pixels, is resampled to resolution x resolution by
       Pillow's antialiased bicubic filter, which clean-fid recommends (Parmar et al., arXiv
       2104.11222). A square that began at half a pixel would blur the picture.
    5. It becomes RGB for 3 channels, or grey for 1.

Of an animation, the first frame is taken. An EXIF block that is damaged turns nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from benchmarks.data.picture_faults import Seen, Unusable, fault_of, judge_pictures
from registry import progress
from trainers.devices import machine_memory

SQUARES = "largest centred square at whole pixels"  # the rule, for records of what was trained on
BAR_FROM = 2000  # pictures from which on reading shows a progress bar
LOOKED_AT = 64  # pictures that are decoded where the others are only checked
_TURNS = {  # EXIF's orientation, and what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The largest pictures are refused below, with their names. Others are no attack for being large.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # see `_upright`


def read_picture(path: str | Path | BinaryIO, resolution: int, channels: int) -> Tensor:
    """One picture as uint8 [channels resolution resolution]."""
    with Image.open(path) as image:
        return _reduced(image, resolution, channels)


def _reduced(image: Image.Image, resolution: int, channels: int) -> Tensor:
    image.draft("RGB", (4 * resolution, 4 * resolution))  # decode a large JPEG at a smaller size
    return as_pixels(image, resolution, channels)


def as_pixels(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """A picture that is open already, as uint8 [channels resolution resolution]."""
    _scale_transparency(image)
    image.load()  # before EXIF is read, which would load it too, and whose errors are passed over
    upright = _opaque_rgb(_upright(image))
    side = min(upright.size)
    left, top = ((length - side) // 2 for length in upright.size)
    square = upright.resize(
        (resolution, resolution),
        Image.Resampling.BICUBIC,
        box=(left, top, left + side, top + side),
    )
    values = np.array(square if channels == 3 else square.convert("L"))
    return torch.from_numpy(values.reshape(resolution, resolution, channels)).permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged block raises any kind; viewers, too, show the picture as it is
        orientation = None
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _scale_transparency(image: Image.Image) -> None:
    """Bring the transparent value of a PNG to the scale of its pixels in Pillow.

    Pillow scales the pixels of 2 and 4 bits to 8, and takes the high bytes of 16-bit colours, but
    keeps the transparent value as the file has it. `image` has not been loaded yet.
    """
    value, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    if value is None or image.format != "PNG" or not tiles:
        return
    kind = tiles[0][3] if isinstance(tiles[0][3], str) else tiles[0][3][0]
    if isinstance(value, int) and kind in (scales := {"L;2": 85, "L;4": 17}):
        image.info["transparency"] = value * scales[kind]
    elif isinstance(value, tuple) and kind == "RGB;16B":
        image.info["transparency"] = tuple(v >> 8 for v in value)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise Unusable("floating-point pixels have no known range: save it with 8 or 16 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Unusable(
            f"its values reach from {values.min()} to {values.max()}: save it with 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, 65535, values)  # on white
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def read_pictures(files: tuple[Path, ...], resolution: int, channels: int) -> Tensor:
    """All pictures as uint8 [n c h w]; ValueError names the files that cannot be read.

    The arms of a comparison read the same folder, so the last result is kept and given again while
    the files' names, sizes and times of change stay the same. Do not write into it.
    """
    check_memory(
        len(files),
        (channels, resolution, resolution),
        "Bind image_folder.in_memory = False, which reads each picture when it is needed, or "
        "choose a smaller image_folder.resolution",
    )
    stamps = [(str(path), *_size_and_time(path)) for path in files]
    return _read_all(tuple(stamps), resolution, channels)


@dataclass(frozen=True)
class PictureFiles:
    """Pictures that are read each time they are needed.

    Indices [k] give uint8 [k c h w], as if this were the tensor [n c h w] of all of them.
    """

    files: tuple[Path, ...]
    resolution: int
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.files), self.channels, self.resolution, self.resolution)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: Tensor) -> Tensor:
        def read(row: int) -> Tensor:
            path = self.files[row]
            try:
                return read_picture(path, self.resolution, self.channels)
            except Exception as error:  # decoders raise any kind, and name no file
                raise ValueError(f"{path} cannot be read: {fault_of(error, path)}") from error

        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(read, rows.tolist())))

    def listing(self) -> str:
        """The first 16 hex digits of the SHA-256 of the names and sizes of all files."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(os.fsencode(f"{'/'.join(path.parts[-2:])} {path.stat().st_size}\n"))
        return digest.hexdigest()[:16]


def check_memory(n: int, shape: tuple[int, int, int], instead: str) -> None:
    """ValueError if n pictures of this shape need more than half of the machine's memory.

    `instead` tells the user what to do.
    """
    needed, memory = n * math.prod(shape), machine_memory()
    if memory is not None and needed > memory // 2:
        raise ValueError(
            f"{n} pictures of {shape} take {needed / 2**30:.1f} GiB, more than half of this "
            f"machine's {memory / 2**30:.1f} GiB. {instead}"
        )


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:  # it went between being found and being read
        raise ValueError(f"{path} cannot be read: {fault_of(error, path)}") from error
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1)
def _read_all(stamps: tuple[tuple[str, int, int], ...], resolution: int, channels: int) -> Tensor:
    pixels = torch.empty(len(stamps), channels, resolution, resolution, dtype=torch.uint8)

    def read(row: int) -> Seen | str:
        path = Path(stamps[row][0])
        try:
            with Image.open(path) as image:
                side, frames = min(image.size), has_frames(image)
                pixels[row] = _reduced(image, resolution, channels)
        except Exception as error:  # decoders raise any kind; all are reported below
            return f"{path} ({fault_of(error, path)})"
        return Seen(side, int(pixels[row].max()), frames)

    with ThreadPoolExecutor() as pool:
        made = pool.map(read, range(len(stamps)))
        worth = len(stamps) >= BAR_FROM
        reports = progress.bar(made, "reading pictures", worth=worth, total=len(stamps))
        judge_pictures(list(reports), resolution)
    return pixels


def check_pictures(files: Sequence[Path], resolution: int = 1) -> None:
    """ValueError that names the files which are no pictures or are cut off, before hours of work.

    A whole JPEG or PNG ends with a known mark. So for these only the header and the end are read,
    and the picture is decoded only if the mark is missing. Pictures of other kinds are decoded, and
    some, evenly spaced, of every kind, so that a warning can tell of dark ones.
    """
    spaced = {i * len(files) // LOOKED_AT for i in range(LOOKED_AT)}
    with ThreadPoolExecutor() as pool:
        made = pool.map(_check, files, (row in spaced for row in range(len(files))))
        worth = len(files) >= BAR_FROM
        reports = progress.bar(made, "checking pictures", worth=worth, total=len(files))
        judge_pictures(list(reports), resolution)


def _check(path: Path, look: bool) -> Seen | str:
    """What was seen of a picture, or a text that says what is wrong with it."""
    try:
        with Image.open(path) as image:
            side, frames = min(image.size), has_frames(image)
            end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format or "")
        whole = end is not None and end in _last_bytes(path)
        brightest = int(read_picture(path, 8, 3).max()) if look or not whole else None
    except Exception as error:  # decoders raise any kind; all are reported
        return f"{path} ({fault_of(error, path)})"
    return Seen(side, brightest, frames)


def has_frames(image: Image.Image) -> bool:
    """Whether it is an animation or has several pages; a camera's MPO holds one and its preview."""
    return bool(getattr(image, "is_animated", False)) and image.format != "MPO"


def _last_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        return file.read()
