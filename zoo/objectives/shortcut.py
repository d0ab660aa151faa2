"""Shortcut models: two half steps of the network itself are the target of one whole step.

    u(x, t, r) = ( u(x, t, m) + u(x', m, r) ) / 2,   m = (t + r) / 2,   x' = x - (t - m) u(x, t, m)

Step sizes are t - r = 2^-k for k = 0 ... log2(num_steps), on the grid of multiples of the step. A
share of the rows learns this self-consistency (k < log2(num_steps)); the others are the anchor:
flow matching at the smallest step, t - r = 1 / num_steps.

Guidance of scale w enters the targets that are made of two smallest steps, and longer steps learn
it from these. The smallest step itself is the anchor and learns no guidance: samples in num_steps
evaluations are unguided, unless the sampler guides them, as `cfg` with `least_nfe` does.

From the paper (Frans et al., arXiv 2410.12557) and its released code: all of the above, 128 steps,
1/8 of the rows (the paper says 1/4), targets from an EMA of 0.999 clipped to +-4 (latents of unit
scale). The code splits k evenly over the rows and gives the remainder to k = 0, drops labels on the
anchor's rows alone, and averages with a constant decay. Our reading: k is drawn uniformly per row,
labels are dropped on any row, the average's decay warms up (zoo/teachers.py), and the step enters
the network through (t, r) as for every other method instead of as its logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Cond,
    LossOutput,
    Network,
    Path,
    Reference,
    Teacher,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.dropout import shares_dropout
from zoo.guidance import unlabelled
from zoo.ops import first_rows, like, mean_flat, terms_of
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_velocity
from zoo.teachers import EmaTeacher
from zoo.times import check_fraction, quota, uniform_draws
from zoo.weighting import Unweighted


@objectives.register("shortcut")
@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """Self-consistency of doubled steps, anchored by flow matching at the smallest; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("even_steps",)
    reference: ClassVar = Reference(
        title="One Step Diffusion via Shortcut Models",
        authors="Frans et al.",
        year=2024,
        arxiv="2410.12557",
    )
    exact_with: ClassVar = {"num_steps": 2**14}  # the anchor is u over one step, not v

    path: Path = field(default_factory=Linear)
    teacher: Teacher = field(default_factory=EmaTeacher)
    velocity: VelocityEstimator = field(default_factory=Conditional)
    weight: Weight = field(default_factory=Unweighted)
    num_steps: int = 128
    bootstrap_fraction: float = 0.125
    clip: float = 4.0
    guidance_scale: float = 1.0
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_fraction("shortcut.bootstrap_fraction", self.bootstrap_fraction)
        if self.num_steps < 2 or self.num_steps & (self.num_steps - 1):
            raise ValueError(f"shortcut.num_steps = {self.num_steps!r} must be a power of two >= 2")
        check_velocity("shortcut", self.velocity, anchors=False)
        if shares_dropout(self.teacher):
            raise ValueError(
                "shortcut.teacher has dropout = 'shared', and Shortcut has targets for some of its "
                "rows alone, whose masks would not be those of the prediction; set dropout = 'off'"
            )

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        n = quota(len(batch), self.bootstrap_fraction)

        def times(rows: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            return self.draw_times(rows, n, rng)

        d = draw(batch, rng, self.path, times, self.label_dropout)
        v, k, teacher = self.velocity.target(d, net, rng), batch.share.size(n), self.teacher(net)
        rows = d.x_t[:k], d.t[:k], d.r[:k], first_rows(d.cond, k), d.labelled[:k]
        target = torch.cat([self._two_halves(teacher, *rows), v[k:]]).detach()

        out = net(d.x_t, d.t, d.r, d.cond)
        error = mean_flat((out["u"] - target) ** 2)
        terms = terms_of(consistency=error[:k], v=error[k:])
        return LossOutput(per_sample=self.weight(error, out), terms=terms, t=d.t, r=d.r)

    def trains_step(self, t: float, r: float) -> bool:
        """Whether t - r is one of the step sizes, and both times lie on its grid."""
        size = max(t - r, 1e-9)
        level, position = -math.log2(size), (1 - t) / size
        levels = range(int(math.log2(self.num_steps)) + 1)
        known = levels if self.bootstrap_fraction else levels[-1:]
        return (
            round(level) in known
            and abs(level - round(level)) < 1e-3  # times may be rounded to float32
            and abs(position - round(position)) < 1e-2
        )

    def guides(self, t: float, r: float) -> bool:
        """Whether guidance reaches this step: all but the smallest, which is the anchor."""
        return t - r > 1.5 / self.num_steps

    def draw_times(self, n: int, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, r) [n] on the grid: k rows with any larger step, then rows with the smallest."""
        levels = int(math.log2(self.num_steps))
        level = torch.full((n,), levels, device=rng.device)
        level[:k] = torch.randint(levels, (k,), generator=rng, device=rng.device)
        cells = 2.0**level
        position = (uniform_draws(n, rng) * cells).floor()
        return 1 - position / cells, 1 - (position + 1) / cells

    def _two_halves(
        self, teacher: Network, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None, labelled: Tensor
    ) -> Tensor:
        """The average of the teacher's two half steps from t over the middle to r."""
        if not self.bootstrap_fraction:
            return torch.zeros_like(x)
        m = (t + r) / 2
        guided = labelled & (t - r < 3 / self.num_steps)  # where the halves are smallest steps
        u1 = self._guided(teacher, x, t, m, cond, guided)
        x_m = (x - like(t - m, x) * u1).clamp(-self.clip, self.clip)
        u2 = self._guided(teacher, x_m, m, r, cond, guided)
        return ((u1 + u2) / 2).clamp(-self.clip, self.clip)

    def _guided(
        self, teacher: Network, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None, rows: Tensor
    ) -> Tensor:
        u = teacher(x, t, r, cond)["u"]
        if self.guidance_scale == 1:
            return u
        null = teacher(x, t, r, unlabelled(cond))["u"]
        return torch.where(like(rows, x), null + self.guidance_scale * (u - null), u)
