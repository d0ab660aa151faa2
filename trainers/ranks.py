"""The processes of a run: how many there are, which one leads, what they agree on.

Process 0 leads: it alone prints, records and writes what belongs to the whole run. Everything here
also works in a single process, where it costs nothing. The processes find each other through
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which every launcher of torch sets.
The functions here exchange a few numbers and texts, over gloo on the CPU, so that no GPU waits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")

log = logging.getLogger(__name__)

MINUTES = 30.0  # that a process waits for another one

# The group for exchanges over gloo. None stands for the default group, where that uses gloo.
_control: Any = None


def launched() -> bool:
    """Whether a launcher started this process and told it its number."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(minutes: float = MINUTES) -> None:
    """Meet the other processes; a process that waits longer for another one raises an error."""
    global _control
    if dist.is_initialized():
        return
    backend, timeout = "gloo", timedelta(minutes=minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_number())
        backend = "nccl"
    if launched():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _control = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else None


def wait_at_most(minutes: float = MINUTES) -> None:
    """Change how long a process waits for another one before it raises an error."""
    c10d = dist.distributed_c10d
    # Older versions of torch have it under a private name only.
    set_timeout = dist.set_timeout if hasattr(dist, "set_timeout") else c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):  # DeepSpeed makes groups of its own
        set_timeout(timedelta(minutes=minutes), group)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def number() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_number() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    return number() == 0


def largest(*values: float) -> list[float]:
    """The largest of each value over all processes."""
    if count() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return found.tolist()


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their numbers."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value, group=_control)
    return found


def from_leader(value: T) -> T:
    """The value that the leading process gives."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_control, device=torch.device("cpu"))
    return box[0]


def together(act: Callable[[], T], *expected: type[Exception]) -> T:
    """Call `act` in every process and return its result.

    If one process raises an error of a type in `expected`, every process raises it, so that none
    goes on without the others.
    """
    problem: Exception | None = None
    try:
        result = act()
    except expected as error:
        problem = error
    problems = gathered(None if problem is None else (type(problem), str(problem)))
    if problem is not None:
        raise problem
    for rank, other in enumerate(problems):
        if other is not None:
            raise _like(other[0], f"process {rank}: {other[1]}")
    return result


def _like(kind: type[Exception], text: str) -> Exception:
    """An error of this type, or of the nearest type above it that a text alone makes."""
    for above in kind.__mro__:
        with suppress(TypeError):
            return cast(Exception, above(text))
    raise AssertionError("Exception takes a text")


def fail_together(problem: str, seconds: float = 30.0) -> None:
    """Call it after an error: it returns if every process had one, else it ends this process.

    The other processes may be waiting for this one in an exchange, and end when this one ends.
    """
    if count() == 1:
        return
    met = Event()
    # A thread, since only process 0 heeds the time-out of a barrier: the others would wait for it
    # as long as their group was once made to, even if it has stopped answering.
    Thread(target=_meet, args=(met, seconds), daemon=True).start()
    if not met.wait(seconds):
        slow = "timed out" in problem.lower()
        hint = "Processes wait for each other for zero_engine.timeout_minutes. " if slow else ""
        log.critical(
            "process %d cannot go on with the others, or they without it: %s\n%sThe run continues "
            "from its last checkpoint with --resume",
            *(number(), problem, hint),
        )
        os._exit(1)


def _meet(met: Event, seconds: float) -> None:
    with suppress(RuntimeError):  # a process is gone or late: nobody is met
        dist.monitored_barrier(group=_control, timeout=timedelta(seconds=seconds))
        met.set()
