"""Where a run stands: the loop writes it, callbacks read it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from registry.protocols import Engine, LossOutput
from trainers import ranks
from trainers.budget import Budget


class Callback(Protocol):
    """Is called at four moments of a run.

    `on_end` is called in every case; `state.finished` tells whether there was no exception.
    """

    def on_start(self, state: TrainState) -> None:
        """Before the first step, with a checkpoint already restored (`state.resumed`)."""
        return

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        """After each update; `out` is detached, and reading a number from it may stall a GPU."""
        return

    def on_evaluate(self, state: TrainState, values: Mapping[str, float]) -> None:
        """After an evaluation."""
        return

    def on_end(self, state: TrainState) -> None:
        """After the last step or an exception."""
        return


@dataclass
class Stopwatch:
    """Counts training seconds: the time between `start` and `stop`."""

    elapsed: float = 0.0
    _since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.elapsed, self._since = self.seconds, None

    @property
    def running(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        return self.elapsed + (time.perf_counter() - self._since if self._since else 0.0)


@dataclass(kw_only=True, eq=False)
class TrainState:
    """A run's network, counters and clock."""

    net: nn.Module
    engine: Engine
    budget: Budget
    seed: int
    batch_size: int
    device: torch.device
    folder: Path | None = None
    callbacks: tuple[Callback, ...] = ()
    group: int = 1  # rows that are not shared out, but stay together

    step: int = 0  # updates done
    images: int = 0
    lr: float = 0.0
    grad_norm: Tensor | None = None  # of the last update, before clipping
    emas: dict[str, nn.Module] = field(default_factory=dict)  # as TrainStep.emas
    features: dict[str, str] = field(default_factory=dict)  # SHA-256 of the weights, by field
    resumed: Path | None = None  # the checkpoint that the run continues
    stop: str = ""  # a callback's reason to end after this step, the same in every process
    stop_request: str = ""  # why this process was asked to end; all of them then `stop` together
    finished: bool = False  # the loop came to its end without an exception
    clock: Stopwatch = field(default_factory=Stopwatch)

    _agreed: float | None = field(default=None, init=False, repr=False)

    @property
    def seconds(self) -> float:
        return self.clock.seconds if self._agreed is None else self._agreed

    def agree(self) -> None:
        """Let all processes use the slowest one's clock, and end if one was asked to end."""
        if ranks.count() == 1:
            self.stop = self.stop or self.stop_request
            return
        self._agreed, requested = ranks.largest(self.clock.seconds, bool(self.stop_request))
        if requested:
            self.stop = self.stop or next(filter(None, ranks.gathered(self.stop_request)))

    @property
    def progress(self) -> float:
        return self.budget.progress(self)

    @property
    def ema_net(self) -> nn.Module:
        """The first running average of the weights, or the network itself where there is none."""
        return next(iter(self.emas.values()), self.net)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside the `with` block does not count as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the work that is queued still counts
        running = self.clock.running
        self.clock.stop()
        try:
            yield
        finally:
            if running:
                self.clock.start()

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Tell every callback the result of an evaluation."""
        for callback in self.callbacks:
            callback.on_evaluate(self, values)
