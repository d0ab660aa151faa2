"""Toys that train their derivative: two self-distillations of flow maps, and TVM.

    LSD    || dX/dr (x_t, t, r) - sg v(X, r) ||^2                on a share of the rows
    ESD    || dX/dt + grad X v ||^2, v = sg u(x, t, t)           on a share of the rows
    TVM    || dX/dr (x_t, t, r) - v_ema(X, r) ||^2 + || u(x_s, s, s) - v_c ||^2

with X = x - (t - r) u and flow matching on the other rows of LSD and ESD.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from registry.protocols import (
    Batch,
    DifferentiableDerivative,
    LossOutput,
    Network,
    TransparentTeacher,
)
from zoo.derivatives.methods import Dual
from zoo.ops import first_rows, like, mean_flat, normal_like, rows_from
from zoo.paths import Linear
from zoo.teachers import EmaTeacher, Online
from zoo.times import quota


@dataclass(frozen=True, kw_only=True)
class Lsd:
    """Lagrangian self-distillation."""

    heads: ClassVar = ("u",)
    differentiates: ClassVar = ("derivative",)

    derivative: DifferentiableDerivative = field(default_factory=Dual)
    teacher: TransparentTeacher = field(default_factory=Online)
    off_diagonal_fraction: float = 0.25
    eulerian: bool = False

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        n, x1 = len(batch), normal_like(batch.x0, rng)
        t, shorter = torch.rand(2, n, generator=rng)
        k = quota(n, self.off_diagonal_fraction)
        r = torch.where(torch.arange(n) < k, shorter * t, t)
        x0, x1, t, r, cond = batch.share.rows(batch.x0, x1, t, r, batch.cond)
        sample, k = Linear().sample(x0, x1, t), batch.share.size(k)

        first, later = first_rows(cond, k), rows_from(cond, k)
        point, one = (sample.x_t[:k], t[:k], r[:k]), torch.ones_like(t[:k])
        gap, zero = like(t[:k] - r[:k], point[0]), torch.zeros_like(one)
        along = (torch.zeros_like(point[0]), zero, one)
        if self.eulerian:
            v = self.teacher(net)(point[0], t[:k], t[:k], first)["u"]
            along = (v, one, zero)
        out, du = self.derivative.with_graph(lambda *at: net(*at, first), point, along, "u")
        if self.eulerian:  # dX/dt + grad X v = v - u - (t - r) du
            residual = v - out["u"] - gap * du
        else:
            x_r = (point[0] - gap * out["u"]).detach()
            residual = out["u"] - gap * du - self.teacher(net)(x_r, r[:k], r[:k], first)["u"]
        fm = net(sample.x_t[k:], t[k:], t[k:], later)["u"] - sample.velocity[k:]
        error = mean_flat(torch.cat([residual, fm]) ** 2)
        return LossOutput(per_sample=error, terms={"u": error.detach()}, t=t, r=r)


@dataclass(frozen=True, kw_only=True)
class Tvm:
    """Terminal velocity matching; with `through` the target's gradient reaches the point X too."""

    heads: ClassVar = ("u",)
    differentiates: ClassVar = ("derivative", "input")

    derivative: DifferentiableDerivative = field(default_factory=Dual)
    teacher: TransparentTeacher = field(default_factory=lambda: EmaTeacher(decay=0.9))
    through: bool = False

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        n, x1 = len(batch), normal_like(batch.x0, rng)
        t, shorter, s = torch.rand(3, n, generator=rng)
        x0, x1, t, r, s, cond = batch.share.rows(batch.x0, x1, t, shorter * t, s, batch.cond)
        sample, gap = Linear().sample(x0, x1, t), like(t - r, x0)

        along = (torch.zeros_like(x0), torch.zeros_like(t), torch.ones_like(r))
        point = (sample.x_t, t, r)
        out, du = self.derivative.with_graph(lambda *at: net(*at, cond), point, along, "u")
        x_r = sample.x_t - gap * out["u"]
        target = self.teacher.through(net) if self.through else self.teacher(net)
        terminal = mean_flat((out["u"] - gap * du - target(x_r, r, r, cond)["u"]) ** 2)
        at_s = Linear().sample(x0, x1, s)
        fm = mean_flat((net(at_s.x_t, s, s, cond)["u"] - at_s.velocity) ** 2)
        return LossOutput(per_sample=terminal + fm, terms={"v": fm.detach()}, t=t, r=r)
