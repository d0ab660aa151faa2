"""After an error a process meets the others, or it ends within a bounded time."""

from __future__ import annotations

import time
from datetime import timedelta
from threading import Event
from typing import Any

import pytest
import torch.distributed as dist

from trainers import ranks


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit status with which this process, one of two, would have ended."""
    found: list[int] = []
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "number", lambda: 1)
    monkeypatch.setattr("os._exit", found.append)
    return found


@pytest.mark.parametrize("answer", ["never", "refused"])
def test_process_that_meets_nobody_ends_within_the_bound(
    answer: str, ended: list[int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A barrier does not heed its time-out on a process that waits for a stopped process 0."""
    never = Event()

    def barrier(group: Any, timeout: Any) -> None:
        if answer == "refused":
            raise RuntimeError("a peer is gone")
        never.wait(60)

    monkeypatch.setattr("torch.distributed.monitored_barrier", barrier)
    begun = time.monotonic()
    ranks.fail_together("the exchange timed out", seconds=0.2)
    assert time.monotonic() - begun < 10
    never.set()
    assert ended == [1]
    assert "process 1 cannot go on with the others" in caplog.text
    assert "zero_engine.timeout_minutes" in caplog.text


def test_processes_that_meet_go_on(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[timedelta] = []
    monkeypatch.setattr(dist, "monitored_barrier", lambda group, timeout: bounds.append(timeout))
    ranks.fail_together("an error", seconds=10.0)
    assert ended == []
    assert bounds == [timedelta(seconds=10)]


def test_wait_is_bounded_in_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[timedelta, Any]] = []
    monkeypatch.setattr(dist, "set_timeout", lambda *given: found.append(given), raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ranks.join()
    try:
        ours = {dist.group.WORLD, dist.new_group(backend="gloo")}
        every = {*dist.distributed_c10d._world.pg_map}  # a library may have made groups of its own
        ranks.wait_at_most(0.5)
    finally:
        ranks.leave()
    assert {group for _, group in found} == every
    assert ours <= every
    assert {bound for bound, _ in found} == {timedelta(seconds=30)}
