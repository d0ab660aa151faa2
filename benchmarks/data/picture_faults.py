"""What is wrong with pictures, in words: why one cannot be read, and what looks like a mistake.

The decoders raise errors of any kind, which name neither the file nor a remedy.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from benchmarks.data.image_files import SHOWN

DARK = 128  # of 255: if no pixel of all pictures is as bright, their range is not what it should be
_BEGINNINGS = {  # the first bytes of files that are often saved under the name of a picture
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself by git lfs pull",
    b"<": "a page of HTML or XML, perhaps of a failed download: fetch the file again",
    b"{": "JSON text, perhaps of a failed download: fetch the file again",
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"%PDF": "a PDF document: save its pages as PNG or JPEG",
    b"\x93NUMPY": "a NumPy array: save it as PNG or TIFF",
}

log = logging.getLogger(__name__)


class Unusable(ValueError):
    """A picture that was decoded and cannot be used; its text says why and what to do."""


@dataclass(frozen=True)
class Seen:
    """What was seen of a picture that can be read."""

    side: int  # the shorter one, in pixels
    brightest: int | None = None  # the largest value of its pixels, where they were read
    frames: bool = False  # it has several, of which the first is taken


def fault_of(error: Exception, path: Path | None = None) -> str:
    """Why a picture cannot be read, and what to do; `path` is its file, where it has one."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, PermissionError):
        return "this user may not read it: change its permissions"
    if path is not None and not path.is_file():
        return "it is no file any more: put it back"
    if isinstance(error, Image.DecompressionBombError):
        size = re.search(r"\d+", str(error))
        return (
            f"it has {int(size[0]) if size else 0:,} pixels, and at most "
            f"{2 * (Image.MAX_IMAGE_PIXELS or 0):,} are read: save it smaller"
        )
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture that Pillow can read" + ("" if path is None else _kind(path))
    if isinstance(error, MemoryError):
        return "it does not fit into memory: save it smaller"
    return "it is damaged or cut off: make or copy it again"


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(32)
    if not begin:
        return ": it is empty, 0 bytes"
    if begin[4:8] == b"ftyp":
        return f", but of the kind {begin[8:12].decode('latin1')!r}: save it as PNG or JPEG"
    known = (text for mark, text in _BEGINNINGS.items() if begin.lstrip().startswith(mark))
    text = next(known, None)
    return f", but {text}" if text else f": its first bytes are {begin[:8].hex(' ')}"


def judge_pictures(reports: Sequence[Seen | str], resolution: int) -> None:
    """ValueError if pictures cannot be read; warnings of what looks like a mistake.

    A report is what was seen of a picture, or a text that says what is wrong with it. Warned of are
    pictures smaller than the resolution, files of several frames, and pictures that are all dark.
    """
    refuse_unreadable([report for report in reports if isinstance(report, str)], len(reports))
    seen = [report for report in reports if isinstance(report, Seen)]
    if small := [one.side for one in seen if one.side < resolution]:
        log.warning(
            "%d of %d pictures are smaller than %d pixels and are enlarged; the smallest has %d",
            *(len(small), len(seen), resolution, min(small)),
        )
    if several := sum(one.frames for one in seen):
        log.warning(
            "%d of %d pictures have several frames or pages; the first of each is taken",
            *(several, len(seen)),
        )
    values = [one.brightest for one in seen if one.brightest is not None]
    if values and max(values) < DARK:
        log.warning(
            "the pictures are dark: the largest value of %d that were looked at is %d of 255 (in "
            "files of 16 bits about %d of 65535). So it is where 10, 12 or 14 bits are stored in "
            "16, or small numbers in 8. If white is meant to be larger, multiply the values and "
            "save the pictures again, so that white is 65535, or 255 in 8 bits",
            *(len(values), max(values), 257 * max(values)),
        )


def refuse_unreadable(
    broken: Sequence[str], count: int, remedy: str = "repair or remove them"
) -> None:
    """ValueError if there are broken pictures among `count`; it shows the first of their texts."""
    if broken:
        more = f"\nand {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ValueError(
            f"{len(broken)} of {count} pictures cannot be read; {remedy}:\n"
            + "\n".join(broken[:SHOWN])
            + more
        )
