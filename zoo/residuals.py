"""Residuals of an average velocity: zero at the truth, with the sign of an error in u.

    exact      g = u - d + (t - r) du/dt,  the derivative along (d, 1, 0)
    rcgm       g = ((t - r) u - D) / (t - m) - d,  m = max(t - delta, r),
               D the displacement of `order` teacher steps from (x - (t - m) d, m) to r

`rcgm` needs no derivative and tends to `exact` as delta -> 0; its bias at the truth is O(delta). It
is the consistency target of RCGM (order 2, delta 0.01) as read from the public code of TwinFlow.
Rows with t - r <= delta become flow matching, g = u - d. The public code comes to the same by a
mask over these rows, and divides zero by zero where t = r. It also limits g to +-1 by element,
which is left to the objective here, and which `consistency_error` does: the loss of RCGM, a part
of TwinFlow's.

`end_of_step` and `start_of_step` are of the map X = x - (t - r) u, and are trained: its end must
move with the flow as r changes, and stay where it is as (x, t) moves with the flow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import residuals
from registry.protocols import (
    Cond,
    Derivative,
    DifferentiableDerivative,
    Network,
    Reference,
    Residual,
)
from zoo.derivatives.one_pass import DerivativeOfU, OnePass, outputs_then_derivative
from zoo.ops import clipped, like, mean_flat

Rows = tuple[Tensor, Tensor, Tensor]  # x [b *d], t [b], r [b]


@residuals.register("exact")
@dataclass(frozen=True, kw_only=True)
class Exact:
    """The MeanFlow residual, with the derivative of the network along (d, 1, 0)."""

    derivative: Derivative = field(default_factory=OnePass)

    def __call__(
        self,
        du_along: DerivativeOfU,
        teacher: Network,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Cond | None,
        u: Tensor,
        direction: Tensor,
    ) -> Tensor:
        du_dt = du_along((direction, torch.ones_like(t), torch.zeros_like(r)))
        return u - direction + like(t - r, x) * du_dt


@residuals.register("rcgm")
@dataclass(frozen=True, kw_only=True)
class Rcgm:
    """A finite difference of the flow map, continued to r by a few steps of the teacher."""

    reference: ClassVar = Reference(
        title="Any-step Generation via N-th Order Recursive Consistent Velocity Field Estimation",
        authors="Sun and Lin",
        year=2026,
    )
    derivative: ClassVar[None] = None

    order: int = 2
    delta: float = 0.01

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"rcgm.order = {self.order!r} must be at least 1")
        if not 0 < self.delta < 1:
            raise ValueError(f"rcgm.delta = {self.delta!r} must lie in (0, 1)")

    def __call__(
        self,
        du_along: DerivativeOfU,
        teacher: Network,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Cond | None,
        u: Tensor,
        direction: Tensor,
    ) -> Tensor:
        step = (t - r).clamp_max(self.delta)
        return two_step_residual(teacher, (x, t, r), step, cond, u, direction, self.order)


def end_of_step(
    derivative: DifferentiableDerivative, net: Network, rows: Rows, cond: Cond | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The network's outputs, X(x, t, r) = x - (t - r) u, and dX/dr = u - (t - r) du/dr, with graph.

    X and dX/dr are [b *d].
    """
    x, t, r = rows
    along, gap = (torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(r)), like(t - r, x)
    out, du_dr = derivative.with_graph(lambda x, t, r: net(x, t, r, cond), rows, along, "u")
    return out, x - gap * out["u"], out["u"] - gap * du_dr


def start_of_step(
    derivative: DifferentiableDerivative, net: Network, rows: Rows, cond: Cond | None, v: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The network's outputs, and -(dX/dt + grad X v) = u + (t - r) Du - v [b *d], with graph.

    Du is the derivative of u along (v, 1, 0).
    """
    x, t, r = rows
    along = v, torch.ones_like(t), torch.zeros_like(r)
    out, du = derivative.with_graph(lambda x, t, r: net(x, t, r, cond), rows, along, "u")
    return out, out["u"] + like(t - r, x) * du - v


def two_step_residual(
    teacher: Network,
    point: Rows,
    step: Tensor,
    cond: Cond | None,
    u: Tensor,
    direction: Tensor,
    order: int = 1,
) -> Tensor:
    """The difference between one step of the map and two, divided by the length of the first.

    The one step goes from (x, t) to r with the average velocity u [b *d]. Of the two, the first is
    short and goes along `direction`, and the second is the teacher's from there to r. With m = t -
    step and z = x - step d, the difference is ((t - r) u - D) / step - d, where D is the
    displacement of `order` teacher steps from (z, m) to r. With one of them it is
    [u - a d - (1 - a) u(z, m, r)] / a, a = step / (t - r). `step` [b] lies in [0, t - r]; where it
    is 0, which it may be at t = r alone, the difference is u - d.
    """
    x, t, r = point
    m = t - step
    z = x - like(step, x) * direction
    width = (m - r) / order
    displacement = torch.zeros_like(x)
    for i in range(order):
        start, end = r + (order - i) * width, r + (order - i - 1) * width
        move = like(width, x) * teacher(z, start, end, cond)["u"]
        displacement, z = displacement + move, z - move
    # Where t = r the step is 0 and must not divide: the displacement is 0 and the ratio is 1.
    divisor = torch.where(step > 0, step, 1)
    ratio = torch.where(step > 0, (t - r) / divisor, 1)
    return like(ratio, x) * u - displacement / like(divisor, x) - direction


def consistency_error(
    residual: Residual,
    net: Network,
    teacher: Network,
    point: tuple[Tensor, Tensor, Tensor],
    cond: Cond | None,
    direction: Tensor,
    clip: float,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The network's outputs, the error || u - sg[u - clip(g)] ||^2 [b], and the residual g [b *d].

    `clip` limits each element of g.
    """
    out, du_along = outputs_then_derivative(residual.derivative, net, cond, point)
    u = out["u"]
    g = residual(du_along, teacher, *point, cond, u.detach(), direction)
    target = (u - clipped(g, clip, "element")).detach()
    return out, mean_flat((u - target) ** 2), g


def short_step_factor(gap: Tensor) -> Tensor:
    """1 + tan(2 pi (1 - gap) / 5) [b] of gaps t - r: from 1 at a gap of 1 to 4.1 at 0."""
    return 1 + torch.tan((1 - gap) * math.pi / 2.5)
