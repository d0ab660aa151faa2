"""The start-up probe: it compares the objective's derivative with differences on the real network.

A network that cuts a derivative (by a stray .detach(), or by a number taken out of a tensor) gives
a wrong derivative without an error, and `dual` and `jvp` agree on it. So every Derivative of an
objective is compared with a method that cannot fail in the same way: central differences of a
float64 copy. Both see the same copy of the network. It is in training mode unless it draws random
numbers, and its weights are perturbed so that layers which start at zero take part. x (along its
path), t and r are moved one at a time, so that no direction hides a cut in another:

    error = rms(found - reference) / max(rms(reference), rms(output) / 100),  the largest of three

A parametrisation must not jump in time, where differences and derivatives have nothing in common;
`backbones/parametrisations/smoothness.py` looks for a jump at all times.

Where the objective trains its derivative, the gradient of that derivative is compared too: three
numbers, one for each input that moves, along a few directions of all weights (probes/gradients.py).

An objective that `splits_batch` needs rows that do not depend on one another. So half of the rows
are moved alone, and the derivative of the others must be zero.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import registry
from backbones.network import FlowNetwork
from backbones.parametrisations.smoothness import check_smooth
from registry.protocols import Cond, Derivative, Objective, parts, trains_derivative
from trainers.probes.gradients import gradient_error
from trainers.probes.point import (
    DIRECTIONS,
    NO_RULE,
    Expected,
    Point,
    add_noise,
    bound_of,
    dtype_name,
    perturbed,
    point_on_path,
)
from zoo.derivatives.methods import FiniteDifference, no_gradient, replay_rng
from zoo.derivatives.rows import COUPLED, rows_meet, some_rows
from zoo.ops import like, rms

__all__ = ["add_noise", "perturbed", "probe_derivatives"]

STEPS = {torch.float64: (1e-3, 1e-4, 1e-5), torch.float32: (1e-2, 1e-3, 1e-4)}


def probe_derivatives(
    objective: Objective,
    net: nn.Module,
    x0: Tensor,
    cond: Cond | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> dict[str, float]:
    """{"derivative_error": the largest error}, or {} if the objective takes no derivative.

    An objective that trains its derivative has "derivative_gradient_error" beside it.

    x0 are two rows of data or more, on the device of the run. The output is u, or the first head
    of an objective without u. ValueError for an error above the bound and for a network that the
    derivative cannot pass at all. The figure of a network that cannot run in float64 is
    "derivative_error_float32". `net` and all generators stay as they are.
    """
    found = [(path, part) for path, part in parts(objective) if isinstance(part, Derivative)]
    if not found:
        return {}
    with replay_rng(), no_gradient(), autocast or nullcontext():
        point = point_on_path(x0, cond, "u" if "u" in objective.heads else objective.heads[0])
        if isinstance(net, FlowNetwork) and point.key in net.velocities:
            check_smooth(net.parametrisation, point.key, x0.shape[1:], cond)
        real = perturbed(net, x0.device).train()
        repeatable = _settle(real, point)
        expected = _expected(real, point)
        errors, of_gradients = [], []
        for path, part in found:
            subject = f"its {path}, {_described(part)},"
            if not (repeatable or part.needs_forward_ad):
                raise ValueError(f"{subject} {UNREPEATABLE}")
            if getattr(objective, "splits_batch", False):
                _check_rows(part, real, point, subject, training=repeatable)
            errors.append(_error(part, real, point, expected, subject))
            if trains_derivative(objective):
                of_gradients.append(gradient_error(part, real, point, expected, subject))
    figures = {"derivative_error": errors, "derivative_gradient_error": of_gradients}
    return {f"{name}{expected.suffix}": max(found) for name, found in figures.items() if found}


def _settle(net: nn.Module, point: Point) -> bool:
    """Put a network that draws random numbers in eval mode; whether a seed repeats its draws."""

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return point.output(net)

    def same(one: Tensor, other: Tensor) -> bool:
        return bool((rms(one - other) <= 1e-2 * rms(one)).all())

    first, again, other = draw(0), draw(0), draw(1)
    if not same(first, other):
        net.eval()
    return same(first, again)


def _expected(net: nn.Module, point: Point) -> Expected:
    try:
        value = _differences(copy.deepcopy(net).double(), point, torch.float64)
    except (RuntimeError, TypeError):  # a device without float64, a cast inside the network
        value = _differences(copy.deepcopy(net).float(), point, torch.float32)
    return Expected(value, rms(value).maximum(rms(point.output(net)) / 100))


def _differences(net: nn.Module, point: Point, dtype: torch.dtype) -> Tensor:
    """The derivative; each row is that of the finer of the two successive steps that agree best."""
    by_step = [point.derivative(FiniteDifference(step=s), net, dtype) for s in STEPS[dtype]]
    gaps = torch.stack([rms(fine - coarse) for coarse, fine in pairwise(by_step)])
    best = 1 + gaps.argmin(0)
    return torch.stack(by_step)[best, torch.arange(len(best), device=best.device)]


def _error(
    part: Derivative, net: nn.Module, point: Point, expected: Expected, subject: str
) -> float:
    """The largest error over the directions; ValueError above the bound."""
    value = _taken(part, net, point, subject)
    misses = rms(value - expected.value).square().unflatten(0, (len(DIRECTIONS), -1)).mean(1)
    sizes = expected.size.square().unflatten(0, (len(DIRECTIONS), -1)).mean(1)
    errors = (misses / sizes).sqrt()
    worst, direction = errors.max(0)
    bound = bound_of(part, net, expected)
    if not worst <= bound:
        raise ValueError(
            f"{subject} is wrong on this network: along {DIRECTIONS[int(direction)]} its relative "
            f"error is {float(worst):.2g}, more than {bound:g}, against central differences in "
            f"{dtype_name(expected.value.dtype)}.\n"
            f"{WRONG if part.needs_forward_ad else COARSE}"
        )
    return float(worst)


def _check_rows(
    part: Derivative, net: nn.Module, point: Point, subject: str, *, training: bool
) -> None:
    """ValueError if rows of the network depend on one another, in training mode if it may be.

    Dropout does not matter: all evaluations of a derivative have the same masks. Draws that a seed
    does not repeat would differ, so such a network stays in the mode that it is in.
    """
    moved = some_rows(len(point.primals[0])).to(point.primals[0].device)
    along = tuple(torch.where(like(moved, d), d, torch.zeros_like(d)) for d in point.tangents)
    before = net.training
    net.train(training or before)
    whole = _taken(part, net, point, subject)
    some = _taken(part, net, replace(point, tangents=along), subject)
    net.train(before)
    if rows_meet(whole, some, moved):
        kinds = {type(m).__name__ for m in net.modules() if isinstance(m, _BatchNorm)}
        named = f" ({', '.join(sorted(kinds))})" if kinds else ""
        raise ValueError(
            f"{subject} cannot be taken: rows of this network depend on one another{named}; "
            f"{COUPLED}."
        )


def _taken(part: Derivative, net: nn.Module, point: Point, subject: str) -> Tensor:
    """The derivative in float32; ValueError if the network does not let it pass."""
    try:
        return point.derivative(part, net, torch.float32)
    except RuntimeError as error:  # and NotImplementedError, which is one
        raise ValueError(
            f"{subject} cannot pass this network: {str(error).splitlines()[0]}\n{NO_RULE}"
        ) from error


def _described(part: Derivative) -> str:
    """The part by its name in gin, such as finite_difference(step=0.001)."""
    return repr(part).replace(type(part).__name__, registry.derivatives.name_of(part), 1)


WRONG = (
    "Something in the network hides a dependence on x, t or r from forward mode: .detach() or "
    ".data, .item() or float() or numpy, torch.no_grad, an autograd.Function with a wrong jvp. "
    "Mend it, or choose @finite_difference()."
)
COARSE = (
    "The step is too coarse for a network that scales its times (by 1000, say) and too fine for "
    "weights in bfloat16. Feed the network unscaled times, keep its weights in float32, change "
    "finite_difference.step, or choose @dual()."
)
UNREPEATABLE = (
    "takes the difference of two evaluations, but this network draws random numbers that torch's "
    "global generator does not govern, so the two see different ones. Draw them (dropout, say) "
    "from the global generator, switch them off, or choose @dual()."
)
