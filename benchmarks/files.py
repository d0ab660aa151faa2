"""Files: locks, contents that are written whole or not at all, hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path`, until the process ends at the latest, or raise ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process runs {what} in {path.parent}") from error
        yield


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def file_sha256(file: Path) -> str:
    """Remembered until the file changes."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _sha256(file: Path, _size: int, _time: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_one_thread = threading.RLock()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One thread of one process at a time.

    lockf, because a flock would be kept by every forked data loader; it does not exclude threads.
    """
    with _one_thread, open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
        yield
