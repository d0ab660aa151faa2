"""Which files of a folder are pictures, and which classes they have.

Every file whose suffix is one of `SUFFIXES` is taken for a picture, also in sub-folders of any
depth. Hidden files and folders are left out. The files are sorted by their paths, so that their
order is the same on every machine.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = tuple(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tif .tiff "
    ".webp".split()
)
SHOWN = 10  # names in an error

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundPictures:
    """The pictures of a folder, sorted; without classes, `labels` and `classes` are empty."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] = ()  # for each file an index into `classes`
    classes: tuple[str, ...] = ()


def find_pictures(
    folder: Path, *, labelled: bool, unlabelled: str = "bind image_folder.labelled = False"
) -> FoundPictures:
    """All pictures below the folder; a warning counts the files that are no pictures.

    `unlabelled` tells the user, in an error, how to go on without labels.
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
        log.warning(
            "%s: %d files are no pictures and are ignored (%s)", folder, others.total(), kinds
        )
    files.sort(key=lambda path: path.parts)
    classes = _classes(folder, files, unlabelled) if labelled else ()
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[path.relative_to(folder).parts[0]] for path in files if classes]
    return FoundPictures(tuple(files), tuple(labels), classes)


def _classes(folder: Path, files: list[Path], unlabelled: str) -> tuple[str, ...]:
    """The names of the sub-folders that are the classes.

    A single sub-folder tells no picture from another, so it gives no classes, as none does.
    """
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
        if os.path.realpath(top) in seen:  # a link leads back to a folder that was seen
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
