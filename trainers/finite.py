"""Stops a run at a loss or gradient that is not finite, or skips it, and says where it arose."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from registry.protocols import LossOutput, Share
from trainers import ranks
from trainers.state import Callback, TrainState

POLICIES = ("stop", "skip")
MAX_SKIPPED = 20  # updates in a row
ADVICE = (
    "\nWhat to try: a lower learning rate or more warm-up steps, gradient clipping "
    "(torch_engine.max_grad_norm = 1.0), torch_engine.precision = 'fp32', data free of NaN, or a "
    "time law that keeps away from the times named here"
)
_SHOWN = 5  # rows, terms and parameters that a message names

log = logging.getLogger(__name__)


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is NaN or infinite; the message names step, terms, rows, t and r."""


@dataclass(kw_only=True, eq=False)
class StopOnNonFinite(Callback):
    """Raises NonFiniteLoss, in all processes alike.

    On a CPU it checks every step, before the weights are changed (the engine holds the update
    back). On a GPU it checks every `every` steps, so that no step waits for the device; the weights
    may be spoilt by then, and the run can continue from its last checkpoint. With the policy "skip"
    it checks every step, and leaves such updates out with a warning, up to MAX_SKIPPED in a row.
    """

    every: int = 50
    policy: str = "stop"

    _skipped: int = field(default=0, init=False, repr=False)  # in a row
    _held: list[tuple[int, LossOutput, Tensor | None]] = field(
        default_factory=list, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"StopOnNonFinite(every={self.every!r}) must be 1 or more")
        if self.policy not in POLICIES:
            raise ValueError(
                f"run.non_finite = {self.policy!r}; allowed: {', '.join(map(repr, POLICIES))}"
            )

    def on_start(self, state: TrainState) -> None:
        if self.policy == "skip" and not state.engine.holds_back(state.device):
            raise ValueError(
                "run.non_finite = 'skip' needs an engine that holds such updates back: on a GPU "
                "that is zero_engine"
            )

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        self._held.append((state.step, out, state.grad_norm))
        each_step = state.device.type == "cpu" or self.policy == "skip"
        if each_step or state.step % self.every == 0:
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
                if problem := problem_of(state, step, out, norm):
                    self._act(state, problem)
        elif held:
            self._skipped = 0

    def _act(self, state: TrainState, problem: str) -> None:
        if self.policy == "stop" or self._skipped == MAX_SKIPPED:
            raise NonFiniteLoss(problem + ADVICE)
        self._skipped += 1
        log.warning("%s\nThis update is left out", problem)
        for p in state.net.parameters():
            p.grad = None


def problem_of(state: TrainState, step: int, out: LossOutput, norm: Tensor | None) -> str:
    """What is not finite and where, in the same words in every process; '' if all is well."""
    bad, share = ~out.per_sample.isfinite(), Share(ranks.number(), ranks.count(), state.group)
    problem = "\n".join(_describe_rows(out, bad, share)) if bad.any() else ""
    problems = [found for found in ranks.gathered(problem) if found]
    if not problems and norm is not None and not norm.isfinite():
        problems = ranks.gathered("\n".join(_describe_gradient(state, out, share)))
    return f"step {step}: " + "\n".join(dict.fromkeys(problems)) if problems else ""


def _describe_rows(out: LossOutput, bad: Tensor, share: Share) -> Iterator[str]:
    yield f"the loss is not finite in {int(bad.sum())} of {len(bad)} rows"
    wrong = {name: int((~v.isfinite()).sum()) for name, v in out.terms.items()}
    named = [f"{name} ({count} rows)" for name, count in wrong.items() if count]
    yield f"terms that are not finite: {', '.join(named) or 'none, so it is the weighting'}"
    yield from _times(out, bad.nonzero().flatten()[:_SHOWN], share)


def _describe_gradient(state: TrainState, out: LossOutput, share: Share) -> Iterator[str]:
    yield "the loss is finite, but its gradient is not"
    names = [
        name
        for name, p in state.net.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield f"parameters concerned: {', '.join(names[:_SHOWN])}{more}"
    largest = out.per_sample.topk(min(_SHOWN, len(out.per_sample))).indices
    yield from _times(out, largest, share)


def _times(out: LossOutput, rows: Tensor, share: Share) -> Iterator[str]:
    """A line for each of these rows of the share, with its place in the batch, times and loss."""
    for row in rows.tolist():
        times = [
            f"{name}={value[row].item():.6g}"
            for name, value in (("t", out.t), ("r", out.r))
            if value is not None
        ]
        loss = out.per_sample[row].item()
        size = f"loss {loss:.4g}" if math.isfinite(loss) else f"loss {loss}"
        yield f"  row {share.place(row)}: {' '.join([*times, size])}"
