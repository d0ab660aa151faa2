"""Looks for a jump of a parametrisation in time, which a derivative of the network cannot show.

A derivative is taken inside the pieces between jumps, and a network whose parametrisation jumps
trains as if there were none. So the velocity, and the trunk's inputs, are computed for one row of
data and one readout at many times t from 0.0001 to 0.9999, with r = t / 2. Where neighbours differ
most from a straight line, the interval is halved again and again: a change that is continuous, a
bend too, becomes as small as the interval, and a jump stays as large as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import registry
from registry.protocols import (
    Call,
    Cond,
    Parametrisation,
    Preconditioning,
    rows_of,
    to_device,
)

TIMES, CHUNK, ELEMENTS = 513, 32, 64
SUSPECTS, HALVINGS = 8, 16
JUMP = 1e-3  # of the largest value; the narrowest interval is 3e-8

OfTime = Callable[[Tensor], Tensor]


@torch.no_grad()
def check_smooth(
    parametrisation: Parametrisation, key: str, shape: Sequence[int], cond: Cond | None = None
) -> None:
    """ValueError if the velocity `key`, or an input of the trunk, jumps in t or is not finite.

    `shape` is that of one sample, and the first row of the conditions is used.
    """
    rng, given = torch.Generator().manual_seed(0), to_device(cond, "cpu")
    x, raw = (torch.randn(1, *shape, generator=rng, dtype=torch.float64) for _ in range(2))

    def at(t: Tensor) -> Call:
        rows = rows_of(given, torch.zeros(len(t), dtype=torch.int64))
        return Call(x.expand(len(t), *shape), t, t / 2, rows)

    watched: dict[str, OfTime] = {
        f"the velocity {key!r}": lambda t: parametrisation(raw.expand(len(t), *shape), key, at(t))
    }
    if isinstance(parametrisation, Preconditioning):
        inputs = parametrisation.inputs
        watched["the trunk's x"] = lambda t: inputs(at(t)).x
        watched["the trunk's t"] = lambda t: inputs(at(t)).t
        watched["the trunk's r"] = lambda t: inputs(at(t)).r
    for what, of_time in watched.items():
        if found := _fault(of_time):
            name = registry.parametrisations.name_of(parametrisation)
            raise ValueError(
                f"the parametrisation {name!r}: {what} {found}, with r = t / 2. The objective "
                "differentiates through it, so it must be finite and continuous in the times: take "
                "out comparisons and roundings of times, and put a bound on what divides"
            )


def _fault(whole: OfTime) -> str:
    """What is wrong, and at which time; '' for a function without a jump."""

    def of_time(t: Tensor) -> Tensor:
        return whole(t).reshape(len(t), -1)[:, :ELEMENTS]  # as many as show a jump

    times = torch.linspace(1e-4, 1 - 1e-4, TIMES, dtype=torch.float64)
    values = torch.cat([of_time(part) for part in times.split(CHUNK)])
    if not values.isfinite().all():
        return f"is not finite at t = {times[~values.isfinite().all(1)][0]:.4g}"
    bends = _rms(values[2:] - 2 * values[1:-1] + values[:-2])
    first = torch.cat([bends.topk(SUSPECTS).indices + side for side in (0, 1)])
    low, high = times[first], times[first + 1]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        left, right = (_rms(of_time(middle) - of_time(end)) for end in (low, high))
        low, high = torch.where(right > left, middle, low), torch.where(right > left, high, middle)
    steps = _rms(of_time(high) - of_time(low))
    if steps.max() <= JUMP * _rms(values).max():
        return ""
    return f"jumps at t = {high[steps.argmax()]:.4g}"


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(1).sqrt()
