"""Several cells at a time on this machine, each in a process of its own.

Each worker is pinned to its own cores and sees its own GPUs. Its output goes to output.log in the
cell's folder. When this process dies, even by `kill -9`, its workers die with it and lose what they
did since their last checkpoints.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.launchers.launcher import OUTPUT, Progress, interruptible
from benchmarks.threads import core_numbers
from registry import launchers
from registry.protocols import Ended, Job, RunCell

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

T = TypeVar("T")


@launchers.register("subprocesses")
@dataclass(frozen=True, kw_only=True)
class Subprocesses:
    """Runs `workers` cells at a time, each in a process with its own share of cores and GPUs.

    With `ranks`, each cell is run by that many processes on its share, for @zero_engine(). A worker
    has cores // workers threads even when fewer cells are left: the rounding of sums depends on the
    number of threads, and a cell that is resumed must stay equal to the last bit.
    """

    workers: int = 2
    ranks: int = 1

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("ranks", self.ranks)):
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"subprocesses.{name} = {value!r} must be 1 or more")

    def __call__(self, jobs: Sequence[Job], run_cell: RunCell) -> Iterator[Ended]:
        waiting, running = deque(jobs), dict[int, Worker]()
        progress = Progress()
        with interruptible() as interrupted:
            try:
                while running or (waiting and not interrupted):
                    if interrupted:
                        for worker in running.values():
                            worker.stop()
                    else:
                        for place in sorted({*range(self.workers)} - {*running})[: len(waiting)]:
                            running[place] = self._worker(waiting.popleft(), run_cell, place)
                    time.sleep(0.1)
                    for place, worker in list(running.items()):
                        if worker.process.poll() is not None:
                            yield running.pop(place).ended()
                    progress.tell([worker.job for worker in running.values()])
            finally:
                for worker in running.values():
                    worker.kill()
        if interrupted:
            raise KeyboardInterrupt

    def _worker(self, job: Job, run_cell: RunCell, place: int) -> Worker:
        cores = _share(core_numbers(), place, self.workers)
        pinned = cores if hasattr(os, "sched_setaffinity") else ()
        threads = max(1, len(cores) // self.ranks)
        environment = _environment(threads, place, self.workers)
        return Worker(job, run_cell, pinned, self.ranks, environment)


class Worker:
    """A process that runs one cell, or starts the processes that do."""

    def __init__(
        self,
        job: Job,
        run_cell: RunCell,
        cores: Sequence[int],
        ranks: int,
        environment: Mapping[str, str],
    ):
        self.job = job
        self._stopping = False
        words = [str(job.folder), ",".join(map(str, cores)), str(ranks), address_of(run_cell)]
        with open(job.folder / OUTPUT, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.worker", *words],
                env=dict(environment),
                stdin=subprocess.PIPE,  # closes when this process ends; see benchmarks/worker.py
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )

    def stop(self) -> None:
        """Ask the process, once, to save a checkpoint and to end."""
        if not self._stopping:
            self._stopping = True
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> bytes:
        """End the process and every process that it started; returns what it has answered."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.communicate()[0]

    def ended(self) -> Ended:
        status, answer = self.process.returncode, self.kill()
        if answer:
            return Ended(**json.loads(answer))
        if status in (-signal.SIGTERM, -signal.SIGINT):
            return Ended(self.job.name, "stopped", "outside its training; nothing to save")
        died = f"killed by {_signal_name(-status)}" if status < 0 else f"exit status {status}"
        return Ended(self.job.name, "failed", f"{died}; see {self.job.folder / OUTPUT}")


def address_of(function: Callable[..., object]) -> str:
    """MODULE:NAME, by which another process finds the function.

    ValueError for a function that is not at the top level of a module.
    """
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise ValueError(
            f"{function.__qualname__} of {function.__module__} cannot be found by another process; "
            "define it at the top level of a module that can be imported"
        )
    return f"{function.__module__}:{function.__qualname__}"


def _share(items: Sequence[T], place: int, places: int) -> Sequence[T]:
    """This worker's share; with more workers than items, one item each, used in turns."""
    size = len(items) // places
    return items[place * size :][:size] if size else items[place % len(items) :][:1]


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _environment(cores: int, place: int, places: int) -> dict[str, str]:
    threads = {name: _at_most(cores, os.environ.get(name, "")) for name in THREADS}
    gpus = _gpus()
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(_share(gpus, place, places))} if gpus else {}
    return {**os.environ, **threads, **devices}


def _at_most(cores: int, given: str) -> str:
    return str(min(cores, int(given)) if given.isdigit() else cores)


def _signal_name(number: int) -> str:
    perhaps = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
    return signal.Signals(number).name + perhaps
