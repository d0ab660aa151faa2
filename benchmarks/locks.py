"""Locks of processes, each held on a lock file.

They are locks of `lockf`. A lock of `flock` would pass to every forked data loader, which keeps it
after the process that took it has ended. A lock ends with its process at the latest, so that a
killed process blocks nobody.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_one_thread = threading.RLock()


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path`; ValueError if another process holds it.

    `what` names the work for the error, such as "an encoding".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process runs {what} in {path.parent}") from error
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file at `path`, then hold it: one thread of one process at a time.

    `lockf` does not exclude the threads of one process from each other, so they share a lock of
    their own, whatever the path.
    """
    with _one_thread, open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
        yield
