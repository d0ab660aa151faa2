"""Files of a folder that may have come from somebody else, and places that can be written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def file_in(folder: Path, name: str) -> Path:
    """The path of the file `name` of a folder, whether it exists or not.

    ValueError for a name that leads out of the folder, and for a link that does. A snapshot in the
    cache of the Hugging Face hub is made of links to the `blobs` beside it, which may be followed.
    """
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts or path == folder:
        raise ValueError(f"{folder} names the file {name!r}, which is not inside it")
    target, root = path.resolve(), folder.resolve()
    in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (target.is_relative_to(root) or in_cache):
        raise ValueError(
            f"{path} is a link to {target}, which lies outside its folder. If that is the right "
            "file, put a copy of it in the place of the link"
        )
    return path


def check_output(path: Path, option: str, *, folder: bool = False) -> None:
    """ValueError, before any work is done, if no file (or `folder`) can be written at this path."""
    whole = str(path.absolute())
    if whole != whole.encode(errors="replace").decode():
        raise ValueError(
            f"{option} {whole!r}: this name is no UTF-8, and weights in such a folder cannot be "
            "read. Choose another place"
        )
    if path.is_dir() and not folder:
        raise ValueError(f"{option} {path} is a folder; give the name of a file")
    there = [place for place in (path, *path.absolute().parents) if os.path.exists(place)]
    nearest = there[0]
    if (folder or nearest != path) and not nearest.is_dir():
        raise ValueError(
            f"{option} {path}: {nearest} is a file, and no folder. Choose another place"
        )
    if not os.access(nearest, os.W_OK | (os.X_OK if nearest.is_dir() else 0)):
        raise ValueError(f"{option} {path}: {nearest} cannot be written. Choose another place")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits; the file is read every time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
