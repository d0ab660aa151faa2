"""Files of a folder that may have come from somebody else: their names stay inside it."""

from __future__ import annotations

import hashlib
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


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits; the file is read every time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
