"""The processes of a run: how many there are, which one leads, what they agree on.

Process 0 leads: it alone prints, records and writes what belongs to the whole run. Everything here
also works in a single process, where it costs nothing. The processes find each other through
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which every launcher of torch sets.
What they exchange here is a few numbers and texts, over gloo on the CPU: no GPU waits for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

MINUTES = 30.0  # of waiting for another process

_control: Any = None  # the group over gloo; None is the default group, which is


def launched() -> bool:
    """Whether a launcher started this process, and told it its place."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(minutes: float = MINUTES) -> None:
    """Meet the other processes; whoever waits longer than this for them gives up with an error."""
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
    """From now on; whoever waits longer for another process gives up with an error."""
    c10d = dist.distributed_c10d
    # older versions have it under a private name alone
    set_timeout = dist.set_timeout if hasattr(dist, "set_timeout") else c10d._set_pg_timeout
    for group in list(c10d._world.pg_map):  # DeepSpeed makes groups of its own
        set_timeout(timedelta(minutes=minutes), group)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def number() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_number() -> int:
    """Among the processes of this machine."""
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
    """Everybody's value, in the order of the processes."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value, group=_control)
    return found


def from_leader(value: T) -> T:
    """The leader's value."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=_control, device=torch.device("cpu"))
    return box[0]


def together(act: Callable[[], T], *expected: type[Exception]) -> T:
    """What `act` returns; what one process raises of `expected`, all raise, and none goes on."""
    problem: Exception | None = None
    try:
        result = act()
    except expected as error:
        problem = error
    told = gathered(None if problem is None else (type(problem), str(problem)))
    if problem is not None:
        raise problem
    for rank, other in enumerate(told):
        if other is not None:
            raise other[0](f"process {rank}: {other[1]}")
    return result


def fail_together(problem: str, seconds: float = 30.0) -> None:
    """After an error: go on only if every process had one; else end this process at once.

    The others may be in the middle of an exchange with this one; its end ends them too.
    """
    if count() == 1:
        return
    try:
        dist.monitored_barrier(group=_control, timeout=timedelta(seconds=seconds))
    except RuntimeError:
        slow = "timed out" in problem.lower()
        hint = "Processes wait for each other for zero_engine.timeout_minutes. " if slow else ""
        print(
            f"process {number()} cannot go on with the others, or they without it: {problem}\n"
            f"{hint}The run continues from its last checkpoint with --resume",
            file=sys.__stderr__,
            flush=True,
        )
        os._exit(1)
