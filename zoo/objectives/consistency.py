"""Consistency models in discrete time: two points of one trajectory have the same map to the data.

    d( D(x_t, t), sg D(x_m, m) ) / (sigma_t - sigma_m),   x_m = x_t - (t - m) v,   m < t

D(x, t) = x - t u(x, t, 0) is the map to the data, with D(x, 0) = x, and sigma = t / (1 - t) the
noise level, in which papers write times. `velocity` says what v is:

    training (CT)       the conditional velocity: x_m has the data and the noise of x_t
    distillation (CD)   a trained teacher's: one step of its ODE, by Euler or, with `heun`, along
                        v + (1 - m) / (1 - t) (v(x_m, m) - v) / 2, which is Heun's step in sigma

The run has `stages` s = 0, 1, ... of equal length, in which the steps get shorter:

    sigmoid (ECT)   sigma_m = sigma_t max(0, 1 - q^-(s+1) (1 + k sigmoid(-b sigma_t)))
    karras (iCT)    t and m are the ends of one of N q^s intervals of noise levels, which are of
                    equal length in sigma^(1/rho); N q^s = 10, 20, ..., 1280

d is `weight` of the squared distance, summed over elements: the distance itself (ECT), the
pseudo-Huber distance (iCT) or the square. Only the square has the true map as its fixed point, up
to a bias of O(step^2) at each step; the distance moves it from a mean to a geometric median.

The defaults are ECT as published and as in its released code (Geng et al., arXiv 2406.14548): log
sigma ~ N(-1.1, 2^2), which is logit-normal in our t; targets by the network in training under the
same dropout masks; 8 stages, as its CIFAR-10 runs of 200,000 steps have. Where it has c = 0, our
pseudo-Huber distance has c = 1e-8, so that its slope is defined at 0. On 120 forced draws losses
and gradients equal that code's to 1e-10 in float64. iCT (Song and Dhariwal, arXiv 2310.14189) is
gin/objective/consistency_ict.gin. Our reading: m = 0 at the lowest edge of its grid, where iCT is
the identity; draws outside of it, 0.8 %, count for the first and last interval.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Draw,
    LossOutput,
    Network,
    Reference,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Count, NotNegative, Positive, Probability
from zoo.ops import like, sum_flat
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_teachers_scale, check_velocity, guided_by
from zoo.teachers import Online
from zoo.times import LogitNormal, law_at
from zoo.times import noise_levels as levels
from zoo.weighting import PseudoHuber

Steps = Literal["sigmoid", "karras"]


@objectives.register("consistency")
@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The map to the data from two points of one trajectory (ECT, iCT, CD); one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map_to_data",)
    reference: ClassVar = Reference(
        title="Consistency Models Made Easy", authors="Geng et al.", year=2024, arxiv="2406.14548"
    )
    exact_with: ClassVar = (  # short steps from the beginning
        {"steps": "sigmoid", "stages": 1, "factor": 1024.0},
        {"steps": "karras", "stages": 1, "num_intervals": 10_000},
    )

    times: TimeLaw = field(default_factory=lambda: LogitNormal(mean=-1.1, std=2.0))
    velocity: VelocityEstimator = field(default_factory=Conditional)
    target: Teacher = field(default_factory=lambda: Online(dropout="shared"))
    teacher: Teacher = field(default_factory=Online)  # whose ODE is followed, if it was trained
    weight: Weight = field(default_factory=lambda: PseudoHuber(c=1e-8))
    gap_power: NotNegative = 1.0  # of sigma_t - sigma_m, which divides
    steps: Steps = "sigmoid"
    stages: Count = 8
    factor: Positive = 2.0  # q
    k: NotNegative = 8.0  # of the sigmoid; 0 for steps of a constant share of sigma
    b: Positive = 1.0
    num_intervals: Count = 10  # N, of Karras's steps in the first stage
    sigma_range: tuple[float, float] = (0.002, 80.0)
    rho: Positive = 7.0
    heun: bool = False  # where the step follows a teacher
    guidance_scale: float = 1.0
    label_dropout: Probability = 0.0

    def __post_init__(self) -> None:
        if self.steps not in (allowed := get_args(Steps)):
            raise ValueError(f"consistency.steps = {self.steps!r}; allowed: {', '.join(allowed)}")
        if not self.factor > 1:
            raise ValueError(f"consistency.factor = {self.factor!r} must be above 1")
        if not 0 < self.sigma_range[0] < self.sigma_range[1]:
            raise ValueError(f"consistency.sigma_range = {self.sigma_range!r} must rise, above 0")
        check_velocity("consistency", self.velocity, teacher=self.teacher, anchors=False)
        check_teachers_scale("consistency", self.guidance_scale, self.teacher)
        if self.heun and not self.teacher.distils:
            raise ValueError(
                "consistency.heun = True needs the ODE of a trained teacher; bind "
                "consistency.velocity = @teacher() and consistency.teacher = @frozen()"
            )

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        def times(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            t, _ = law_at(self.times, batch.step)(n, rng)
            return self.pair(t, batch.progress)

        d = draw(batch, rng, Linear(), times, self.label_dropout)
        x, t, m, zero = d.x_t, d.t, d.r, torch.zeros_like(d.t)
        x_m = x - like(t - m, x) * self._along(d, rng, self.teacher(net))
        out = net(x, t, zero, d.cond)
        data = x - like(t, x) * out["u"]
        target = x_m - like(m, x) * self.target(net)(x_m, m, zero, d.cond)["u"]
        error = sum_flat((data - target.detach()) ** 2)
        gap = (levels.noise_level(t) - levels.noise_level(m)).to(x.dtype)
        loss = self.weight(error, out) / gap**self.gap_power
        terms = {"data": error.detach() / x[0].numel()}
        return LossOutput(per_sample=loss, terms=terms, t=t, r=zero)

    def pair(self, t: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """The two times [b] of a step, at this share of the run, for the draws t [b] of the law."""
        stage = min(int(progress * self.stages), self.stages - 1)
        sigma = levels.noise_level(levels.off_the_ends(t))
        if self.steps == "sigmoid":
            share = self.factor ** -(stage + 1)
            upper, lower = sigma, levels.sigmoid_second(sigma, share, self.k, self.b)
        else:
            num = round(self.num_intervals * self.factor**stage)
            upper, lower = levels.karras_interval(sigma, num, *self.sigma_range, self.rho)
        return levels.time_of(upper), levels.time_of(lower)

    def _along(self, d: Draw, rng: torch.Generator, teacher: Network) -> Tensor:
        """The velocity of the step from t to m = d.r."""
        v = guided_by(self.velocity, d, teacher, rng, self.guidance_scale - 1)
        if not self.heun:
            return v
        end = replace(d, x_t=d.x_t - like(d.t - d.r, v) * v, t=d.r)
        later = guided_by(self.velocity, end, teacher, rng, self.guidance_scale - 1)
        return v + like((1 - d.r) / (1 - d.t) / 2, v) * (later - v)
