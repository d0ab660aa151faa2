"""Claims about the derivatives of a network in x, t and r.

The mean of a derivative over a short interval, by Gauss's rule with three nodes, is the difference
of the values at its ends over its length. This holds for every smooth function. It fails where an
input is rounded, such as a time to one of 1000 steps, or taken out of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.parts.networks.built import Built
from benchmarks.conformance.parts.networks.network import change_with
from benchmarks.conformance.parts.part import F64
from benchmarks.conformance.results import Broken, ClaimResult, compared, held
from zoo.derivatives import Dual, FiniteDifference, Jvp, OnePass
from zoo.ops import like

HALF = 5e-4  # of the interval: each holds a step of 1/1000, and 1000 t turns by half a radian
NODES = ((-(0.6**0.5), 5 / 18), (0.0, 8 / 18), (0.6**0.5, 5 / 18))
STEP = 1e-5  # of central differences
DIRECTIONS = ("x",) * 3 + ("t",) * 3 + ("r",) * 3  # one row each
# Relative errors, in the middle one of a direction's rows: a kink, such as that of ReLU, may lie in
# the interval of any row. Cutting one branch of one block in twelve costs 15 %.
LIMIT, LIMIT_FLOAT32 = 5e-2, 1e-1
EXACT = 1e-6  # between methods that are right to rounding, in float64
CUT = (
    "no .detach(), .data, .item(), numpy or torch.no_grad between inputs and outputs, and no "
    "autograd.Function with a wrong jvp"
)

Point = tuple[Tensor, Tensor, Tensor]


def backends_agree(built: Built) -> ClaimResult:
    """dual, jvp, one_pass and finite differences give the same derivative."""
    net, dtype = built.precise()
    fn, point, along = _line(built, net, dtype)
    differences = FiniteDifference(step=STEP if dtype == F64 else 1000 * STEP)
    wanted = differences(fn, point, along)
    size = _size(wanted, fn(*point))
    found, refused = {}, []
    for name, method in (("dual", Dual()), ("jvp", Jvp()), ("one_pass", OnePass())):
        try:
            found[name] = method(fn, point, along).detach()
        except NotImplementedError:  # it says that it cannot pass, and what can
            refused.append(name)
    if not found:
        return held(f"finite differences alone; {', '.join(refused)} refuse the network")
    first = next(iter(found.values()))
    between = max(float(((value - first).norm(dim=1) / size).max()) for value in found.values())
    if not between < (EXACT if dtype == F64 else LIMIT):
        raise Broken(f"{', '.join(found)} differ by {between:.2g} of the derivative", CUT)
    direction, error = _worst((first - wanted).norm(dim=1) / size)
    told = f"{', '.join(found)} to {between:.1g}" + f", {', '.join(refused)} refused" * bool(
        refused
    )
    return compared(
        f"{told}; differences",
        error,
        LIMIT if dtype == F64 else LIMIT_FLOAT32,
        f"along {direction} the derivative by {next(iter(found))} is off by {error:.2g} of it from "
        "differences of the outputs",
        CUT,
    )


def smooth(built: Built) -> ClaimResult:
    """Derivatives add up to the differences of the outputs, along x, t and r."""
    net, dtype = built.precise()
    fn, point, along = _line(built, net, dtype)
    half = HALF if dtype == F64 else 10 * HALF

    def at(s: float) -> Point:
        x, t, r = (p + s * half * d for p, d in zip(point, along, strict=True))
        return x, t, r

    with torch.no_grad():
        change = (fn(*at(1)) - fn(*at(-1))) / (2 * half)
        size = _size(change, fn(*point))
    mean = torch.zeros_like(change)
    for node, weight in NODES:
        mean += weight * _derivative(fn, at(node), along)
    direction, error = _worst((mean - change).norm(dim=1) / size)
    limit = LIMIT if dtype == F64 else LIMIT_FLOAT32
    if not error < limit:
        raise Broken(
            f"along {direction} the derivatives miss the difference of the outputs over an "
            f"interval of {2 * half:g} by {error:.2g} of it",
            "no rounding of inputs, such as (1000 * t).long(), no argmax and no .detach(): take "
            "functions with a continuous derivative",
        )
    for name in ("t", "r"):
        own = torch.tensor([d == name for d in DIRECTIONS])
        if not mean[own].abs().max() > 0 and change_with(built, name) > 1e-3:
            raise Broken(
                f"the outputs change with {name}, and their derivative along {name} is 0",
                f"no rounding of {name} to steps, and nothing that cuts its derivative",
            )
    return held(f"off by {error:.2g} < {limit:g}", error, limit)


def _derivative(fn: Callable[..., Tensor], point: Point, along: Point) -> Tensor:
    """By dual numbers, or by differences where these cannot pass."""
    try:
        return Dual()(fn, point, along).detach()
    except NotImplementedError:
        return FiniteDifference(step=STEP)(fn, point, along)


def _worst(errors: Tensor) -> tuple[str, float]:
    """The direction whose middle row has the largest error, and that error."""
    middle = {
        name: float(errors[torch.tensor([d == name for d in DIRECTIONS])].median())
        for name in dict.fromkeys(DIRECTIONS)
    }
    worst = max(middle, key=lambda name: float("inf") if math.isnan(middle[name]) else middle[name])
    return worst, middle[worst]


def _line(built: Built, net: Any, dtype: torch.dtype) -> tuple[Callable[..., Tensor], Point, Point]:
    """The outputs [n k] as a function of (x, t, r), a point, and a direction for each row."""
    x, t, r, cond = built.inputs(len(DIRECTIONS), dtype)

    def fn(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        out = net(x, t, r, cond)
        return torch.cat([out[key].reshape(len(out[key]), -1) for key in built.keys], dim=1)

    rows = {name: torch.tensor([d == name for d in DIRECTIONS]).to(dtype) for name in "xtr"}
    v = built.inputs(len(DIRECTIONS), dtype, seed=3)[0]
    return fn, (x, t, r), (like(rows["x"], v) * v, rows["t"], rows["r"])


def _size(derivative: Tensor, out: Tensor) -> Tensor:
    """What an error in a row's derivative is relative to."""
    return derivative.norm(dim=1).maximum(out.detach().norm(dim=1) / 100).clamp_min(1e-12)
