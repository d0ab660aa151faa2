"""The processes of a run: how many there are, which one leads, what they agree on.

Process 0 leads: it alone prints, records and writes what belongs to the whole run. Everything here
also works in a single process, where it costs nothing. The processes find each other through
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which every launcher of torch sets.
What they exchange here is a few numbers and texts, over gloo on the CPU: no GPU waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(minutes: float = 30.0) -> None:
    """Meet the other processes; whoever waits longer than this for them gives up with an error."""
    if dist.is_initialized():
        return
    backend, timeout = "gloo", timedelta(minutes=minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_number())
        backend = "cpu:gloo,cuda:nccl"
    if launched():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


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
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def gathered(value: T) -> list[T]:
    """Everybody's value, in the order of the processes."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def from_leader(value: T) -> T:
    """The leader's value."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
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
