"""How many threads a process computes with, and how they wait; chosen before torch is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# How often a thread of GNU OpenMP looks for work before it sleeps. By its default of 300,000 a
# thread whose partner waits for a core keeps another core from it: beside other processes a step
# took several times as long. docs/speed.md has what was measured.
SPINS = "1000"

NUM_THREADS = "OMP_NUM_THREADS"
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_chosen: dict[str, str] = {}  # the variables that were not the user's


def choose_threads() -> None:
    """Set how this process and those that it starts use the cores, unless a variable says it.

    Threads that wait go to sleep soon, and there are no more of them than cores that are ours.
    OpenMP reads both when torch is loaded: afterwards nothing is changed.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _WAITING):
        _chosen["GOMP_SPINCOUNT"] = SPINS
    # OpenMP sees the affinity, but not a quota.
    if NUM_THREADS not in os.environ and num_cores() < len(core_numbers()):
        _chosen[NUM_THREADS] = str(num_cores())
    os.environ.update(_chosen)


def threads_of_each(processes: int) -> str:
    """The threads of each of several processes: what the user has set, or a share of the cores."""
    given = "" if NUM_THREADS in _chosen else os.environ.get(NUM_THREADS, "")
    return given or str(max(1, num_cores() // processes))


def num_cores() -> int:
    """How many cores are ours: those that this process may use, at most the quota of its group."""
    return max(1, min([len(core_numbers()), *map(int, _quotas())]))


def core_numbers() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS does not have it
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quotas(
    groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[float]:
    """The cores' time that each control group above this process allows, where one is set.

    A container may show its own group as the root, or name one that it cannot see.
    """
    with suppress(FileNotFoundError):  # not Linux
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                tree = mounted
            elif "cpu" in controllers.split(","):
                tree = mounted / controllers
            else:
                continue
            inner = tree / path.strip("/")
            for folder in (inner, *inner.parents):
                if folder == mounted or mounted in folder.parents:
                    yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    with suppress(OSError):  # no quota can be set in this folder, or it is not there
        quota, period = (folder / "cpu.max").read_text().split()
        if quota != "max":
            yield float(quota) / float(period)
    with suppress(OSError):
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
        if float(quota) > 0:
            yield float(quota) / float(period)
