"""What a console shows: progress bars, and the library's log as lines on stderr.

The library itself prints nothing. The command line, its workers and `progress=True` of the Python
door show it for as long as a command runs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from registry import progress

PACKAGES = ("registry", "zoo", "backbones", "trainers", "benchmarks")


class _Lines(logging.Handler):
    """Notes as plain lines, warnings with their level, on what is stderr at that moment.

    What ends a process goes to the original stderr, since processes that follow have closed theirs.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        line = text if record.levelno == logging.INFO else f"{record.levelname}: {text}"
        critical = record.levelno >= logging.CRITICAL
        print(line, file=sys.__stderr__ if critical else sys.stderr, flush=True)


@contextmanager
def show_output() -> Iterator[None]:
    """Show bars, our packages' log from INFO on, and everybody's from WARNING on."""
    handler, root = _Lines(), logging.getLogger()
    ours = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in ours]
    root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO)
    try:
        with progress.show_progress():
            yield
    finally:
        root.removeHandler(handler)
        for logger, level in zip(ours, before, strict=True):
            logger.setLevel(level)
