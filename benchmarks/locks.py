"""A lock that processes and threads wait for, on a lock file.

It is a lock of `lockf`, as in trainers/checkpoints/locks.py, where a second process is refused.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_one_thread = threading.RLock()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file at `path`, then hold it: one thread of one process at a time.

    `lockf` does not exclude the threads of one process from each other, so they share a lock of
    their own, whatever the path.
    """
    with _one_thread, open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
        yield
