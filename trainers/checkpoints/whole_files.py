"""Files that are written whole or not at all, and the SHA-256 of files.

A file is first written beside its place, under a hidden name that no other writer uses:

    .result.json.5f0c94f1.partial

then it is renamed into place, which replaces an older file in one step. So a reader finds the old
content or the new content, never half of one, and several processes may write the same file at the
same time. If writing fails, the hidden file is removed. A killed process leaves it behind; nothing
ever reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from registry.secrets import concealed

PARTIAL = ".*.partial"  # matches every file that is not in its place yet


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give the path to write to; at the end of the block, what is there becomes the file `path`.

    A durable file survives a power cut, for which the caller waits until the disk has it. Only
    caches that are cheap to make again may do without.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)  # the rename is in the folder


def write_text(path: Path, content: str) -> None:
    """Write a text file whole, in UTF-8, and without the secrets in it."""
    with whole_file(path) as partial:
        partial.write_text(concealed(content), encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole, indented and with a newline at its end."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or to the list of a folder's files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits; the file is read every time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_sha256(path: Path) -> str:
    """`file_sha256`, read again only if the file's size or time of change is another one.

    For large files of weights, whose hash goes into every evaluation. Code that looks for damage
    must read the file each time.
    """
    stat = path.stat()
    return _remembered(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _remembered(path: Path, _size: int, _time: int) -> str:
    return file_sha256(path)
