"""What happens around the updates: records, evaluation, checkpoints, the progress bar.

`fit` calls the callbacks in the order in which it is given them.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from registry import progress
from registry.protocols import LossOutput
from trainers import ranks
from trainers.checkpoints.callback import CheckpointCallback
from trainers.finite import NonFiniteLoss, StopOnNonFinite
from trainers.state import Callback, TrainState

__all__ = [
    "Callback",
    "CheckpointCallback",
    "MetricsLog",
    "NonFiniteLoss",
    "PeriodicEvaluation",
    "ProgressBar",
    "StopOnNonFinite",
]


@dataclass(kw_only=True, eq=False)
class MetricsLog(Callback):
    """Sends means over `every` steps to `record(values, step)`, and each evaluation when it comes.

    Between two records it only keeps references: it computes nothing and never waits for the
    device.
    """

    record: Callable[[dict[str, float], int], None]
    every: int = 50

    _held: defaultdict[str, list[Tensor]] = field(
        default_factory=lambda: defaultdict(list), init=False, repr=False
    )
    _since: tuple[int, float] = field(default=(0, 0.0), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"MetricsLog(every={self.every!r}) must be 1 or more")

    def on_start(self, state: TrainState) -> None:
        self._since = (state.images, state.seconds)

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        self._held["loss"].append(out.per_sample)
        for name, value in out.terms.items():
            self._held[f"terms/{name}"].append(value)
        for name, value in out.diagnostics.items():
            self._held[f"diagnostics/{name}"].append(value)
        if state.grad_norm is not None:
            self._held["grad_norm"].append(state.grad_norm)
        if state.step % self.every == 0:
            self._send(state)

    def on_evaluate(self, state: TrainState, values: Mapping[str, float]) -> None:
        self.record(dict(values), state.step)

    def on_end(self, state: TrainState) -> None:
        if self._held and (state.finished or ranks.count() == 1):
            self._send(state)

    def _send(self, state: TrainState) -> None:
        held, self._held = self._held, defaultdict(list)
        # Each mean is over all rows of the window, since a term may concern few rows of a step.
        rows = {name: torch.cat([v.reshape(-1) for v in vs]) for name, vs in held.items()}
        values = _means({name: value for name, value in rows.items() if len(value)})
        images, seconds = self._since
        self._since = (state.images, state.seconds)
        if state.seconds > seconds:
            values["images_per_second"] = (state.images - images) / (state.seconds - seconds)
        values |= {"lr": state.lr, "images": float(state.images), "seconds": state.seconds}
        self.record(values, state.step)


def _means(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each name over the rows of all processes."""
    means = torch.stack([value.float().mean() for value in rows.values()]).tolist()
    own = {name: (mean, len(rows[name])) for name, mean in zip(rows, means, strict=True)}
    pairs: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for found in ranks.gathered(own):
        for name, pair in found.items():
            pairs[name].append(pair)
    return {
        name: sum(mean * n for mean, n in found) / sum(n for _, n in found)
        for name, found in pairs.items()
    }


@dataclass(kw_only=True, eq=False)
class PeriodicEvaluation(Callback):
    """Calls `fn(state) -> values` every `every` steps (0: never) and at the end.

    Meanwhile the clock stops, the network is in eval mode and no gradient is kept. Every callback
    gets the values.
    """

    fn: Callable[[TrainState], Mapping[str, float]]
    every: int = 0
    at_end: bool = True

    _last: int = field(default=-1, init=False, repr=False)

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        if self.every and state.step % self.every == 0:
            self._evaluate(state)

    def on_end(self, state: TrainState) -> None:
        if self.at_end and state.finished and not state.stop and self._last != state.step:
            self._evaluate(state)

    def _evaluate(self, state: TrainState) -> None:
        self._last = state.step
        training = state.net.training
        with state.paused(), torch.no_grad():
            state.net.eval()
            try:
                values = self.fn(state)
            finally:
                state.net.train(training)
            state.evaluated(values)


@dataclass(kw_only=True, eq=False)
class ProgressBar(Callback):
    """Shows loss, images per second and time left on stderr: a bar on a terminal, else lines.

    It is silent unless progress is shown (registry/progress.py).
    """

    label: str = ""

    _bar: tqdm[Any] | None = field(default=None, init=False, repr=False)
    _start: tuple[int, float, float] = field(default=(0, 0.0, 0.0), init=False, repr=False)
    _shown: float = field(default=0.0, init=False, repr=False)

    def on_start(self, state: TrainState) -> None:
        self._start = (state.images, state.seconds, state.progress)
        self._shown = time.monotonic()
        if progress.is_shown() and sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}|{postfix}"
            self._bar = tqdm(total=1.0, desc=self.label, bar_format=form, dynamic_ncols=True)

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        interval = 10.0 if self._bar is None else 0.5
        if progress.is_shown() and time.monotonic() - self._shown >= interval:
            self._show(state, f"step {state.step}, loss {out.per_sample.mean().item():.4g}")

    def on_end(self, state: TrainState) -> None:
        if progress.is_shown():
            self._show(state, f"step {state.step}")
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, state: TrainState, what: str) -> None:
        self._shown = time.monotonic()
        images, seconds, progress = self._start
        took, advance = state.seconds - seconds, state.progress - progress
        if took > 0 and advance > 0:
            left = timedelta(seconds=round(took * (1 - state.progress) / advance))
            what += f", {(state.images - images) / took:.0f} images/s, {left} left"
        if self._bar is None:
            print(
                f"{self.label} {state.progress:4.0%} {what}".lstrip(), file=sys.stderr, flush=True
            )
        else:
            self._bar.n = state.progress
            self._bar.set_postfix_str(what)
