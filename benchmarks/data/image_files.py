"""A folder of pictures as one uint8 tensor.

Each picture is turned as its EXIF orientation says, laid on white where it is transparent, brought
to 8 bits (16-bit grey by rounding v / 257) and to grey or RGB, and resampled from its largest
centred square to resolution x resolution with Pillow's antialiased bicubic filter, the one that
clean-fid recommends (Parmar et al., arXiv 2104.11222). Of an animation the first frame counts.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from registry import progress

SUFFIXES = tuple(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tif .tiff "
    ".webp".split()
)
BAR_FROM = 2000  # files from which on reading shows a progress bar
SHOWN = 10  # names in an error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The pictures of a folder, sorted; `labels` are indices of `classes`, or both are empty."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()


def find_pictures(
    folder: Path, *, labelled: bool, unlabelled: str = "bind image_folder.labelled = False"
) -> Found:
    """All pictures below the folder, hidden ones aside; warns of files that are no pictures.

    `unlabelled` is how the user would do without labels.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"the picture folder {str(folder)!r} {what}")
    files, others = [], Counter[str]()
    for path in _visible_files(folder):
        if path.suffix.lower() in SUFFIXES:
            files.append(path)
        else:
            others[path.suffix.lower() or "no suffix"] += 1
    kinds = ", ".join(f"{kind} {count}" for kind, count in others.most_common())
    if not files:
        raise ValueError(
            f"no picture in the folder {str(folder)!r}, sub-folders included; files of other "
            f"kinds: {kinds or 'none'}. Pictures are recognised by {' '.join(SUFFIXES)}"
        )
    if others:
        warnings.warn(
            f"{folder}: {others.total()} files are no pictures and are ignored ({kinds})",
            stacklevel=2,
        )
    files.sort(key=lambda path: path.parts)
    classes = _classes(folder, files, unlabelled) if labelled else ()
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[path.relative_to(folder).parts[0]] for path in files if classes]
    return Found(tuple(files), tuple(labels), classes)


def _classes(folder: Path, files: list[Path], unlabelled: str) -> tuple[str, ...]:
    """The sub-folders that are classes; () if there are fewer than two, which say nothing."""
    beside = [path.name for path in files if path.parent == folder]
    used = {path.relative_to(folder).parts[0] for path in files if path.parent != folder}
    if beside and used:
        raise ValueError(
            f"{folder} has pictures beside its sub-folders ({_listed(beside)}) and in them "
            f"({_listed(sorted(used))}), so the sub-folders cannot be the classes. Move the "
            f"pictures into sub-folders, or {unlabelled}"
        )
    folders = {path.name for path in folder.iterdir() if path.is_dir() and not _hidden(path.name)}
    if used and folders - used:
        raise ValueError(
            f"no picture in these class folders of {folder}: {_listed(sorted(folders - used))}. "
            f"Fill or remove them, or {unlabelled}"
        )
    return tuple(sorted(used)) if len(used) > 1 else ()


def _visible_files(folder: Path) -> Iterator[Path]:
    seen = set()
    for top, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(top) in seen:  # a link back to where we were
            folders.clear()
            continue
        seen.add(os.path.realpath(top))
        folders[:] = [name for name in folders if not _hidden(name)]
        yield from (Path(top, name) for name in names if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def read_pictures(files: tuple[Path, ...], resolution: int, channels: int) -> Tensor:
    """uint8 [n c h w]; ValueError that names every file that cannot be read.

    The result is remembered for as long as the files' names, sizes and times stay the same, since
    the arms of a comparison read the same folder; treat it as read-only.
    """
    check_memory(
        len(files),
        (channels, resolution, resolution),
        "Bind image_folder.in_memory = False, which reads them as they are needed, or choose a "
        "smaller image_folder.resolution",
    )
    stamps = [(str(path), *_size_and_time(path)) for path in files]
    return _read_all(tuple(stamps), resolution, channels)


@dataclass(frozen=True)
class PictureFiles:
    """Pictures that are read as they are asked for: indexed with rows [k] like uint8 [n c h w]."""

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
            try:
                return read_picture(self.files[row], self.resolution, self.channels)
            except Exception as error:  # decoders raise anything, and do not say where
                raise ValueError(f"{self.files[row]} cannot be read: {error!r}") from error

        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(read, rows.tolist())))

    def listing(self) -> str:
        """The first 16 hex digits of the SHA-256 of the names and sizes of all files."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(os.fsencode(f"{'/'.join(path.parts[-2:])} {path.stat().st_size}\n"))
        return digest.hexdigest()[:16]


def check_memory(n: int, shape: tuple[int, int, int], instead: str) -> None:
    """ValueError that says what to do `instead`, for pictures that take half of the memory."""
    if not hasattr(os, "sysconf"):  # Windows does not say
        return
    needed = n * math.prod(shape)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory // 2:
        raise ValueError(
            f"{n} pictures of {shape} take {needed / 2**30:.1f} GiB, more than half of this "
            f"machine's {memory / 2**30:.1f} GiB. {instead}"
        )


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1)
def _read_all(stamps: tuple[tuple[str, int, int], ...], resolution: int, channels: int) -> Tensor:
    pixels = torch.empty(len(stamps), channels, resolution, resolution, dtype=torch.uint8)

    def read(row: int) -> int | str:
        try:
            with Image.open(stamps[row][0]) as image:
                side = min(image.size)
                pixels[row] = _reduced(image, resolution, channels)
        except Exception as error:  # decoders raise anything; all of it is reported below
            return f"{stamps[row][0]} ({type(error).__name__}: {error})"
        return side

    with ThreadPoolExecutor() as pool:
        made = pool.map(read, range(len(stamps)))
        worth = len(stamps) >= BAR_FROM
        reports = progress.bar(made, "reading pictures", worth=worth, total=len(stamps))
        judge_pictures(list(reports), resolution)
    return pixels


def check_pictures(files: Sequence[Path], resolution: int = 1) -> None:
    """ValueError that names every file that is no picture or is cut off, before hours of work.

    Of a JPEG or PNG the header and the end are read, and it is decoded as a whole where its end is
    not what it should be; other kinds, which have no such end, are decoded.
    """
    with ThreadPoolExecutor() as pool:
        looked, worth = pool.map(_look, files), len(files) >= BAR_FROM
        reports = progress.bar(looked, "checking pictures", worth=worth, total=len(files))
        judge_pictures(list(reports), resolution)


def _look(path: Path) -> int | str:
    """The shorter side of a picture, or what is wrong with it."""
    try:
        with Image.open(path) as image:
            side = min(image.size)
            end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format or "")
        if end is None or end not in _last_bytes(path):
            read_picture(path, 8, 3)
    except Exception as error:  # decoders raise anything; all of it is reported
        return f"{path} ({type(error).__name__}: {error})"
    return side


def _last_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(64, path.stat().st_size), os.SEEK_END)
        return file.read()


def judge_pictures(reports: Sequence[int | str], resolution: int) -> None:
    """ValueError for pictures that cannot be read, a warning of those smaller than this.

    A report is the shorter side of a picture, or what is wrong with it.
    """
    refuse_unreadable([report for report in reports if isinstance(report, str)], len(reports))
    small = [side for side in reports if isinstance(side, int) and side < resolution]
    if small:
        log.warning(
            "%d of %d pictures are smaller than %d pixels and are enlarged; the smallest has %d",
            *(len(small), len(reports), resolution, min(small)),
        )


def refuse_unreadable(
    broken: Sequence[str], count: int, remedy: str = "repair or remove them"
) -> None:
    """ValueError that shows the first of these pictures out of `count`, if there are any."""
    if broken:
        more = f"\nand {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ValueError(
            f"{len(broken)} of {count} pictures cannot be read; {remedy}:\n"
            + "\n".join(broken[:SHOWN])
            + more
        )


def read_picture(path: str | Path | BinaryIO, resolution: int, channels: int) -> Tensor:
    """One picture as uint8 [channels resolution resolution], by the rules of this module."""
    with Image.open(path) as image:
        return _reduced(image, resolution, channels)


def _reduced(image: Image.Image, resolution: int, channels: int) -> Tensor:
    image.draft("RGB", (4 * resolution, 4 * resolution))  # big JPEGs: skip unseen detail
    return as_pixels(image, resolution, channels)


def as_pixels(image: Image.Image, resolution: int, channels: int) -> Tensor:
    """A picture that is open already, by the same rules."""
    upright = _opaque_rgb(ImageOps.exif_transpose(image))
    square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.BICUBIC)
    values = np.array(square if channels == 3 else square.convert("L"))
    return torch.from_numpy(values.reshape(resolution, resolution, channels)).permute(2, 0, 1)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its values reach from {values.min()} to {values.max()}; save it with 8 or 16 bits"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
