"""Where cells run: one after the other in this process, or in several processes.

A launcher is configuration; called with jobs it runs each and yields how each ended, as they end.
After SIGINT or SIGTERM it starts no more of them, yields those that ran, most as "stopped" with a
checkpoint saved, and raises KeyboardInterrupt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from registry import launchers


@dataclass(frozen=True)
class Job:
    """One cell: its name, and the folder that the grid prepared for it."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Ended:
    """How one cell ended; `reason` is empty for a finished one."""

    name: str
    status: Literal["finished", "failed", "stopped", "pruned"]
    reason: str = ""


class Launcher(Protocol):
    """Runs the jobs; yields how each ended, as they end."""

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Ended]: ...


@launchers.register("in_process")
@dataclass(frozen=True, kw_only=True)
class InProcess:
    """Runs the cells one after the other in this process."""

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Ended]:
        from benchmarks.cell import run_cell

        for job in jobs:
            ended = run_cell(job.folder)
            yield ended
            if ended.status == "stopped":
                raise KeyboardInterrupt
