"""What a console shows: progress bars, and the library's log as lines on stderr.

The library itself prints nothing. The command line, its workers and `progress=True` of the Python
door show it for as long as a command runs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from registry import progress
from registry.secrets import concealed

PACKAGES = ("registry", "zoo", "backbones", "trainers", "benchmarks")


class _Lines(logging.Handler):
    """Notes as plain lines, warnings with their level, on what is stderr at that moment.

    What ends a process goes to the original stderr, since processes that follow have closed theirs.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = concealed(self.format(record))
        line = text if record.levelno == logging.INFO else f"{record.levelname}: {text}"
        critical = record.levelno >= logging.CRITICAL
        print(line, file=sys.__stderr__ if critical else sys.stderr, flush=True)


class _Concealing:
    """A stream through which no secret passes, whoever writes to it.

    What its encoding lacks is written as an escape: a name of a folder ends no run.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        hidden = concealed(text).encode(encoding, "backslashreplace")
        self._stream.write(hidden.decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def concealing() -> Iterator[None]:
    """Inside, what is printed to stdout and stderr shows no secrets."""
    before = sys.stdout, sys.stderr
    inside = cast(TextIO, _Concealing(sys.stdout)), cast(TextIO, _Concealing(sys.stderr))
    sys.stdout, sys.stderr = inside
    try:
        yield
    finally:  # a stream that was replaced meanwhile stays
        sys.stdout = before[0] if sys.stdout is inside[0] else sys.stdout
        sys.stderr = before[1] if sys.stderr is inside[1] else sys.stderr


@contextmanager
def show_output() -> Iterator[None]:
    """Show bars, our packages' log from INFO on, and everybody's from WARNING on.

    No secret is shown, whoever prints it.
    """
    with concealing(), _shown_log():
        yield


@contextmanager
def _shown_log() -> Iterator[None]:
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
