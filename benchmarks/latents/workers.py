"""Jobs shared out over processes and devices, which say how far they are while they work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
Tell: TypeAlias = Callable[[int], object]  # is told of so many rows more
Work: TypeAlias = Callable[[Job, str, int, Tell], Result]  # a job on a device, by threads

LOOK_EVERY = 0.5  # seconds between looks at how far the processes are


def results(
    work: Work[Job, Result], jobs: Sequence[Job], workers: int, devices: Sequence[str], tell: Tell
) -> Iterator[tuple[Job, Callable[[], Result]]]:
    """Each job as its result is there to ask for; in this process where one worker is enough."""
    if workers <= 1:
        for job in jobs:
            yield job, partial(work, job, devices[0], os.cpu_count() or 1, tell)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    places, count = context.Queue(), context.Value("q", 0)
    for number in range(workers):
        places.put(devices[number % len(devices)])
    pool = ProcessPoolExecutor(workers, context, _begin, (places, threads, count))
    told = 0
    try:
        jobs_of = {pool.submit(_work_here, work, job): job for job in jobs}
        waiting: set[Future[Result]] = set(jobs_of)
        while waiting:
            ended, waiting = wait(waiting, LOOK_EVERY, FIRST_COMPLETED)
            now = count.value
            tell(now - told)
            told = now
            for future in ended:
                yield jobs_of[future], future.result
    finally:
        pool.shutdown(cancel_futures=True)  # jobs under way are finished


_place: tuple[str, int] = ("cpu", 1)  # of this worker: its device and threads
_count: Any = None  # what all workers together have done


def _begin(places: Any, threads: int, count: Any) -> None:
    global _place, _count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _place, _count = (places.get(), threads), count


def _end_with_parent() -> None:
    """A killed parent says nothing: its workers would keep their memory, and write beside the next.

    The queue does not tell them, whose writing end they hold themselves.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    parent.join()
    os._exit(1)


def _work_here(work: Work[Job, Result], job: Job) -> Result:
    return work(job, *_place, _tell)


def _tell(rows: int) -> None:
    with _count.get_lock():
        _count.value += rows
