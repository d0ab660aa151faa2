"""Stop at the first loss or gradient that is not finite, and say where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from registry.protocols import LossOutput
from trainers import ranks
from trainers.state import Callback, TrainState

_SHOWN = 5  # rows, terms and parameters that a message names


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is NaN or infinite; the message names step, terms, rows, t and r."""


@dataclass(kw_only=True, eq=False)
class StopOnNonFinite(Callback):
    """Raises NonFiniteLoss.

    On a CPU at the very step, before the weights are touched (the engine holds the update back).
    On a GPU every `every` steps, so that no step waits for the device; the weights are then spoilt,
    and the last checkpoint is the one to continue from.
    """

    every: int = 50

    _held: list[tuple[int, LossOutput, Tensor | None]] = field(
        default_factory=list, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"StopOnNonFinite(every={self.every!r}) must be 1 or more")

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        self._held.append((state.step, out, state.grad_norm))
        if state.device.type == "cpu" or state.step % self.every == 0:
            self._check(state)

    def on_end(self, state: TrainState) -> None:
        if state.finished:
            self._check(state)

    def _check(self, state: TrainState) -> None:
        held, self._held = self._held, []
        values = [v for _, out, norm in held for v in (out.per_sample.sum(), norm) if v is not None]
        bad = bool(values) and not all(map(math.isfinite, torch.stack(values).tolist()))
        if any(ranks.largest(bad)):
            for step, out, norm in held:
                raise_unless_finite(state, step, out, norm)


def raise_unless_finite(state: TrainState, step: int, out: LossOutput, norm: Tensor | None) -> None:
    """NonFiniteLoss in every process, if the loss of any or the gradient is not finite."""
    bad = ~out.per_sample.isfinite()
    problem = "\n".join(_describe_rows(out, bad)) if bad.any() else ""
    problems = [told for told in ranks.gathered(problem) if told]
    if not problems and norm is not None and not norm.isfinite():
        problems = ranks.gathered("\n".join(_describe_gradient(state, out)))
    if not problems:
        return
    problem = "\n".join(dict.fromkeys(problems))
    raise NonFiniteLoss(
        f"step {step}: {problem}\n"
        "What to try: a lower learning rate or more warm-up steps, gradient clipping "
        "(torch_engine.clip = 1.0), torch_engine.precision = 'fp32', data free of NaN, or a time "
        "law that keeps away from the times named here"
    )


def _describe_rows(out: LossOutput, bad: Tensor) -> Iterator[str]:
    yield f"the loss is not finite in {int(bad.sum())} of {len(bad)} rows"
    wrong = {name: int((~v.isfinite()).sum()) for name, v in out.terms.items()}
    named = [f"{name} ({count} rows)" for name, count in wrong.items() if count]
    yield f"terms that are not finite: {', '.join(named) or 'none, so it is the weighting'}"
    yield from _times(out, bad.nonzero().flatten()[:_SHOWN])


def _describe_gradient(state: TrainState, out: LossOutput) -> Iterator[str]:
    yield "the loss is finite, but its gradient is not"
    names = [
        name
        for name, p in state.net.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield f"parameters concerned: {', '.join(names[:_SHOWN])}{more}"
    yield from _times(out, out.per_sample.topk(min(_SHOWN, len(out.per_sample))).indices)


def _times(out: LossOutput, rows: Tensor) -> Iterator[str]:
    """The rows with their loss and times."""
    for row in rows.tolist():
        times = [
            f"{name}={value[row].item():.6g}"
            for name, value in (("t", out.t), ("r", out.r))
            if value is not None
        ]
        loss = out.per_sample[row].item()
        size = f"loss {loss:.4g}" if math.isfinite(loss) else f"loss {loss}"
        yield f"  row {row * ranks.count() + ranks.number()}: {' '.join([*times, size])}"
