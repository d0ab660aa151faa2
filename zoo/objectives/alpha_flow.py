"""alpha-Flow: a curriculum from flow matching over Shortcut's target to MeanFlow, in one share a.

    v rows   || u(x_t, t, t) - v ||^2
    u rows   1/a || u(x_t, t, r) - sg[ a w + (1 - a) u(x_s, s, r) ] ||^2,
             s = t - a (t - r),   x_s = x_t - (t - s) w

The target is two steps: along w from t to s, a share a of t - r, and on to r with the network's own
average velocity. w is v, and the fixed point that of MeanFlow up to O(a); where a = 1, u is
regressed onto v. With `own_first_step` w is u(x_t, t, s) where a < 1, which is exact for every a
and Shortcut's target for a = 1/2. The error is a times the residual g of `two_step_residual`. So
1/a makes the gradient that of g, which tends to MeanFlow's, and without it the gradient vanishes.

Over the run a = first_share + (last_share - first_share) sigmoid(temperature (p - 1/2)), where p
goes from 0 to 1 over the part `ramp` of the run. Shares below `snap` count as 0, where g is
MeanFlow's with du/dt along (v, 1, 0), and shares above 1 - snap as 1.

From the paper (Zhang et al., arXiv 2510.20771) and its released code: all of the above, temperature
25, snap 0.005, a from 1 to 0, MeanFlow's guidance (mean_flow.py), 25 % v rows, no average of the
weights, and a / sg(e + 1e-3) as the weight of the mean squared error e, in place of 1/a. The ramp
of B/2 is the whole run; that of XL/2 is 0.5 to 0.83, with targets of two steps within +-4 (`clip`)
and 50 % v rows. Our reading: times as MeanFlow's; labels are dropped on any row, whose v is
unguided; the factor is a^(2 q - 1) for an adaptive weight of power q, and 1/a for other weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from registry import objectives
from registry.protocols import (
    Batch,
    Derivative,
    LossOutput,
    Network,
    Path,
    Reference,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.derivatives.one_pass import OnePass, outputs_and_derivative
from zoo.guidance import check_interval, velocity_at
from zoo.ops import first_rows, like, mean_flat, terms_of
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_mixture, check_velocity, mixed_by
from zoo.residuals import two_step_residual
from zoo.schedules import sigmoid_ramp
from zoo.teachers import Online, without_gradient
from zoo.times import LogitNormalPair, SplitsSteps, check_fraction
from zoo.weighting import Adaptive


@objectives.register("alpha_flow")
@dataclass(frozen=True, kw_only=True)
class AlphaFlow(SplitsSteps):
    """The target is two steps, and the first of them shrinks to nothing over the run; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = Reference(
        title="AlphaFlow: Understanding and Improving MeanFlow Models",
        authors="Zhang et al.",
        year=2025,
        arxiv="2510.20771",
    )
    exact_with: ClassVar = (
        {"first_share": 0.0, "last_share": 0.0},
        {"first_share": 1e-3, "last_share": 1e-3, "snap": 0.0},  # the bias is O(a)
        {"first_share": 0.3, "last_share": 0.3, "own_first_step": True},
    )

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=lambda: LogitNormalPair(off_diagonal_fraction=0.75))
    velocity: VelocityEstimator = field(default_factory=Conditional)
    teacher: Teacher = field(default_factory=Online)  # of velocities
    derivative: Derivative = field(default_factory=OnePass)
    weight: Weight = field(default_factory=lambda: Adaptive(offset=1e-3))
    own_first_step: bool = False
    first_share: float = 1.0
    last_share: float = 0.0
    ramp: tuple[float, float] = (0.0, 1.0)
    temperature: float = 25.0
    snap: float = 0.005
    clip: float = math.inf
    omega: float = 1.0
    kappa: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_mixture("alpha_flow", self.kappa, self.guidance_interval)
        check_interval("alpha_flow.ramp", self.ramp)
        for name in ("first_share", "last_share", "snap"):
            check_fraction(f"alpha_flow.{name}", getattr(self, name))
        check_velocity("alpha_flow", self.velocity, teacher=self.teacher, anchors=self.splits_batch)

    @property
    def guidance_scale(self) -> float:
        return self.omega / (1 - self.kappa)

    def share(self, progress: float) -> float:
        """a, when this part of the run is over."""
        passed = sigmoid_ramp(progress, self.ramp, self.temperature)
        a = self.first_share + (self.last_share - self.first_share) * passed
        return 0.0 if a < self.snap else 1.0 if a > 1 - self.snap else a

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        mixture, distils = (self.omega, self.kappa, self.guidance_interval), self.teacher.distils
        v = mixed_by(self.velocity, d, self.teacher(net), rng, *mixture, distils=distils)
        quota, model = self.times.num_off_diagonal(len(batch)), without_gradient(net)
        a, k = self.share(batch.progress), batch.share.size(quota)
        first, given = (d.x_t[:k], d.t[:k], d.r[:k]), first_rows(d.cond, k)
        along = self.velocity.along(v[:k], lambda: velocity_at(model, *first[:2], given))

        derivative = self.derivative if quota and a == 0 else None
        tangents = (along, torch.ones_like(first[1]), torch.zeros_like(first[2]))
        point, gap = (d.x_t, d.t, d.r), first[1] - first[2]
        out, du_dt = outputs_and_derivative(derivative, net, d.cond, point, tangents)
        u = out["u"][:k].detach()
        if 0 < a < 1:
            if self.own_first_step:
                along = model(*first[:2], first[1] - a * gap, given)["u"]
            g = two_step_residual(model, first, a * gap, given, u, along)
        else:
            g = u - along + like(gap, u) * du_dt  # du_dt is 0 without a derivative
        limit, a = (self.clip, a) if a else (math.inf, 1.0)  # MeanFlow's target is u - g
        target = torch.cat([(u - a * g).clamp(-limit, limit), v[k:]])
        error = mean_flat((out["u"] - target) ** 2)
        power = 2 * self.weight.power - 1 if isinstance(self.weight, Adaptive) else -1
        loss = self.weight(error, out)
        loss = torch.cat([a**power * loss[:k], loss[k:]])
        terms = terms_of(u=mean_flat(g**2), v=error[k:])
        return LossOutput(per_sample=loss, terms=terms, t=d.t, r=d.r)
