"""Inductive moment matching (IMM): steps to r from t and from a nearer time m give one law.

    w(t) mean over pairs (j, k) of [ k(y_j, y_k) + k(z_j, z_k) - 2 k(y_j, z_k) ]
    y = f(x_t, t, r),   z = sg f(x_m, m, r),   f(x, t, r) = x - (t - r) u(x, t, r),   r <= m < t
    k(a, b) = exp( -max(||a - b||, 1e-8) / (D (t - r)) ),   D the number of elements

The mean is the squared distance of two laws by the kernel k (MMD), from groups of M rows that share
t and r. x_m has the data and noise of x_t. From t to m the ratio eta = sigma / alpha falls by the
same amount at every t, where r and `shortest` leave it room:

    eta(m) = eta(t) - (eta(t_max) - eta(t_min)) / 2^halvings
    w(t)   = 1/2 sigmoid(b - lam) (-dlam/dt) alpha^a / (alpha^2 + sigma^2),   lam = -2 log(eta)

Every map with the right laws is an optimum, so there is no error against the exact map.

From the paper (Zhou, Ermon and Song, arXiv 2503.07565): all of the above, with the numbers of its
best run on ImageNet, t uniform on [t_min, t_max], r uniform on [t_min, t], M = 4, labels dropped in
10 % of the rows. On CIFAR-10 it has t_min = 0.006, halvings = 15, a = 1, b = 5. Its mean has the
pairs j = k too, and so has ours by default. They compare two steps of the same data, as consistency
models do, which moves the optimum; without them (`with_itself = False`) the exact map is one.

Our reading: the rows of a group have one label, and the law of each label is matched; the paper's
groups mix labels, and match the law of all. A row without label takes the data of another group, so
that such rows are draws of all data. Our samplers start at t = 1, the paper's at t_max.

The released code of IMM samples alone. Losses and gradients agree with those of ESC's code (arXiv
2512.11831) to 4e-5, its times being float32, on 60 forced draws of one group, where its two
constants against division by zero are the paper's. It weighs several groups by each other's times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import Batch, Cond, LossOutput, Network, Path, Reference, Teacher, TimeLaw
from registry.ranges import Count, CountOrZero, NotNegative, Probability
from zoo.ops import like
from zoo.paths import Linear, time_at
from zoo.points.draws import Times, draw
from zoo.points.groups import in_groups, kernel_distance
from zoo.teachers import Online
from zoo.times import BetaPair, DrawsSteps, check_every_row, law_at

LEAST_STEP = 1e-6  # t - r in the kernel's width, which divides


@objectives.register("moment_matching")
@dataclass(frozen=True, kw_only=True)
class MomentMatching(DrawsSteps):
    """IMM: the laws of steps from t and from a nearer time agree at r, by a kernel; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "law")
    fixed_point: ClassVar = "distribution"
    exact_with: ClassVar = {"with_itself": False, "halvings": 8}
    reference: ClassVar = Reference(
        title="Inductive Moment Matching",
        authors="Zhou, Ermon and Song",
        year=2025,
        arxiv="2503.07565",
    )

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=lambda: BetaPair(off_diagonal_fraction=1.0))
    teacher: Teacher = field(default_factory=Online)
    group: Count = 4
    with_itself: bool = True
    t_min: Probability = 0.0
    t_max: Probability = 0.994
    halvings: CountOrZero = 12
    shortest: NotNegative = 1e-4
    a: NotNegative = 2.0
    b: float = 4.0
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max < 1:
            raise ValueError(
                f"moment_matching has t_min = {self.t_min!r} and t_max = {self.t_max!r}; it needs "
                "0 <= t_min < t_max < 1, since sigma / alpha has no bound at t = 1"
            )
        if self.group < 2 and not self.with_itself:
            raise ValueError(
                f"moment_matching.group = {self.group!r} leaves no pair of two rows. Set group = 2 "
                "or more, or with_itself = True"
            )
        check_every_row("moment_matching.times", self.times, "where both steps have length 0")

    @property
    def couples_rows(self) -> bool:
        """Whether rows without label take data of other groups."""
        return self.label_dropout > 0

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        times = self._times(batch.step)
        d = draw(batch, rng, self.path, times, self.label_dropout, group=self.group)
        m = self.middle(d.t, d.r)
        x_m = self.path.sample(d.x0, d.x1, m).x_t

        y = in_groups(_step(net, d.x_t, d.t, d.r, d.cond), self.group)
        z = in_groups(_step(self.teacher(net), x_m, m, d.r, d.cond).detach(), self.group)
        gap = in_groups((d.t - d.r).clamp_min(LEAST_STEP)[:, None], self.group)[:, :1]
        width = y.shape[2] * gap
        mmd = kernel_distance(y, z, width, with_itself=self.with_itself).flatten()
        return LossOutput(
            per_sample=self.weight_at(d.t) * mmd,
            terms={"mmd": mmd.detach()},
            t=d.t,
            r=d.r,
        )

    def middle(self, t: Tensor, r: Tensor) -> Tensor:
        """m [b], at which eta is smaller than at t by the decrement."""
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        low, high = self._eta(ends).tolist()
        eta = self._eta(t.double()) - (high - low) / 2**self.halvings
        m = time_at(self.path, eta.clamp_min(0), t.double()).to(t.dtype)
        return torch.maximum(torch.minimum(m, t - self.shortest), r)

    def weight_at(self, t: Tensor) -> Tensor:
        """w(t) [b], with its factors brought together: so it is finite at t = 0."""
        alpha, sigma, path = self.path.alpha(t), self.path.sigma(t), self.path
        turn = alpha * path.d_sigma(t) - sigma * path.d_alpha(t)  # -dlam/dt alpha sigma / 2
        odds = math.exp(self.b)
        logistic = odds * sigma * alpha ** (self.a - 1) / (alpha**2 + odds * sigma**2)
        return logistic * turn / (alpha**2 + sigma**2)

    def _eta(self, t: Tensor) -> Tensor:
        return self.path.sigma(t) / self.path.alpha(t)

    def _times(self, step: int) -> Times:
        """The time law, moved from [0, 1] to [t_min, t_max]."""
        law, size = law_at(self.times, step), self.t_max - self.t_min

        def times(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            t, r = law(n, rng)
            return self.t_min + size * t, self.t_min + size * r

        return times


def _step(net: Network, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> Tensor:
    """f(x, t, r) [b *d]."""
    return x - like(t - r, x) * net(x, t, r, cond)["u"]
