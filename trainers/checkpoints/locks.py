"""The lock of a process on a folder that it alone may write.

It is a lock of `lockf`. A lock of `flock` would pass to every forked data loader, which keeps it
after the process that took it has ended. It ends with its process at the latest, so that a killed
process blocks nobody.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file at `path`; ValueError if another process holds it, or nobody can.

    `what` names the work for the error, such as "an encoding".
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise ValueError(
            f"the folder {path.parent} cannot be written: {error.strerror}. Choose another one"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"another process runs {what} in {path.parent}") from error
        except OSError as error:
            raise ValueError(
                f"the file system of {path.parent} gives no lock: {error.strerror}. Choose a "
                "folder on another one"
            ) from error
        yield
