"""Tasks shared out over worker processes and devices, which report how far they are.

The processes are started anew (`spawn`), since one that is forked cannot use CUDA. Such a process
takes over the import path of this one before it imports anything of ours, so a folder `benchmarks`
in the current directory is not taken for this package.
"""

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

from benchmarks.threads import num_cores

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")
Tell: TypeAlias = Callable[[int], object]  # is told how many more rows are done
# Does a task on a device with a number of threads, and reports the rows that it has done.
Work: TypeAlias = Callable[[Task, str, int, Tell], Outcome]

LOOK_EVERY = 0.5  # seconds between looks at how far the processes are


def outcomes(
    work: Work[Task, Outcome],
    tasks: Sequence[Task],
    workers: int,
    devices: Sequence[str],
    tell: Tell,
) -> Iterator[tuple[Task, Callable[[], Outcome]]]:
    """Each task with a function that gives its outcome, or raises what went wrong in it.

    With several workers, tasks come in the order in which they end. One worker is this process
    itself, and a task is done when its outcome is asked for.
    """
    if workers <= 1:
        for task in tasks:
            yield task, partial(work, task, devices[0], num_cores(), tell)
        return
    threads = max(1, num_cores() // workers)
    context = multiprocessing.get_context("spawn")
    places, count = context.Queue(), context.Value("q", 0)
    for number in range(workers):
        places.put(devices[number % len(devices)])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (places, threads, count))
    reported = 0
    try:
        task_of = {pool.submit(_work_here, work, task): task for task in tasks}
        waiting: set[Future[Outcome]] = set(task_of)
        while waiting:
            ended, waiting = wait(waiting, LOOK_EVERY, FIRST_COMPLETED)
            now = count.value
            tell(now - reported)
            reported = now
            for future in ended:
                yield task_of[future], future.result
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the tasks that have begun


# In a worker process:
_place: tuple[str, int] = ("cpu", 1)  # its device and its number of threads
_count: Any = None  # the rows that all workers together have done


def _start_worker(places: Any, threads: int, count: Any) -> None:
    global _place, _count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _place, _count = (places.get(), threads), count


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone.

    A killed process cannot tell its workers to end. They would keep their memory, and would write
    beside the workers of the next command. They do not notice by their queue either: it stays open
    because they hold its writing end themselves.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    parent.join()
    os._exit(1)


def _work_here(work: Work[Task, Outcome], task: Task) -> Outcome:
    return work(task, *_place, _tell)


def _tell(rows: int) -> None:
    with _count.get_lock():
        _count.value += rows
