"""Files that are written whole or not at all, and the SHA-256 of files.

A file is first written beside its place, under a hidden name that no other writer uses:

    .result.json.5f0c94f1.partial

then it is renamed into place, which replaces an older file in one step. So a reader finds the old
content or the new content, never half of one, and several processes may write the same file at the
same time. If writing fails, the hidden file is removed. A killed process leaves it behind; nothing
ever reads it.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from registry.folders import file_sha256 as file_sha256
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
    """Write a text file whole, in UTF-8, and without the secrets in it.

    A half of a character, as in the name of a folder that is no UTF-8, is written as an escape.
    """
    with whole_file(path) as partial:
        partial.write_bytes(concealed(content).encode(errors="backslashreplace"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole, indented and with a newline at its end."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, which names the file, if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ValueError(f"{path} cannot be read: {problem.strerror}") from problem
    except json.JSONDecodeError as problem:
        place = f"its line {problem.lineno} is no JSON" if problem.doc.strip() else "it is empty"
        raise ValueError(f"{path} cannot be read: {place}") from problem
    except (ValueError, RecursionError) as problem:
        why = "it is no UTF-8 text" if isinstance(problem, UnicodeError) else "it is no plain JSON"
        raise ValueError(f"{path} cannot be read: {why}") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read: it holds no JSON object")
    return content


def sync(path: Path) -> None:
    """Wait until the disk has what was written to a file, or to the list of a folder's files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
