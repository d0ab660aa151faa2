"""Where cells run: in this process, in several processes of this machine, or on a Ray cluster.

    in_process      one after the other
    subprocesses    several at a time on this machine (benchmarks/launchers/subprocesses.py)
    ray_cluster     wherever Ray finds room (benchmarks/launchers/ray_cluster.py)

A launcher is configuration; its contract is registry.protocols.Launcher. It runs each job and
yields how it ended, in the order in which they end. After SIGINT or SIGTERM it starts no more jobs,
waits for those that run (most end as "stopped", with a checkpoint), yields them and raises
KeyboardInterrupt. A second signal acts at once.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from benchmarks.records.jsonl import read_record, read_start
from registry import launchers
from registry.protocols import Ended, Job, RunCell, RunRecord

OUTPUT = "output.log"  # stdout and stderr of a cell that has a process of its own
TELL_SECONDS = 30.0

log = logging.getLogger(__name__)


@launchers.register("in_process")
@dataclass(frozen=True, kw_only=True)
class InProcess:
    """Runs the cells one after the other in this process."""

    serial: ClassVar = True

    def __call__(self, jobs: Sequence[Job], run_cell: RunCell) -> Iterator[Ended]:
        for job in jobs:
            ended = run_cell(job.folder)
            yield ended
            if ended.status == "stopped":
                raise KeyboardInterrupt


class Progress:
    """Notes which cells run in other processes, and now and then how far they are."""

    def __init__(self) -> None:
        self._known = set[str]()
        self._last_note = time.monotonic()

    def tell(self, running: Iterable[Job]) -> None:
        due = time.monotonic() - self._last_note > TELL_SECONDS
        if due:
            self._last_note = time.monotonic()
        for job in running:
            if job.name not in self._known:
                self._known.add(job.name)
                log.info("  %s runs; its output is in %s", job.name, job.folder / OUTPUT)
            elif due:
                log.info("  %s: %s", job.name, _last_line(job.folder / OUTPUT))


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """A list that the first SIGINT or SIGTERM appends its name to; a second one acts as usual."""
    caught: list[str] = []
    handlers: dict[int, Any] = {}

    def restore() -> None:
        while handlers:
            signal.signal(*handlers.popitem())

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        restore()
        log.info("%s: no more cells start; those that run save a checkpoint and stop", caught[0])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def close_lost(job: Job, reason: str, parent: RunRecord) -> None:
    """Close the record of a cell whose process died without doing so, as FAILED for this reason.

    `parent` is the open record of the grid.
    """
    if read_start(job.folder) is None or read_record(job.folder).status != "RUNNING":
        return
    record = parent.child(job.name, job.folder)
    record.tags({"error": reason})
    record.close("FAILED")


def _last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "has printed nothing yet"
