"""MeanFlow: regress the average velocity onto its own differential identity.

    u(x_t, t, r) = v(x_t, t) - (t - r) d/dt u(x_t, t, r)

The total derivative runs along the path, so its tangents are (v, 1, 0) for (x, t, r). `velocity`
says what v is (zoo/points/velocities.py). With the conditional velocity the identity holds in
expectation over x_t. Rows with r = t are plain flow matching, so only the rows with r < t (25 %)
pay for the derivative; the network's own velocity is for these alone.

Guidance during training replaces the conditional velocity v_c, inside an interval of t, by

    v_g = omega v_c + (1 - omega - kappa) u(x_t, t, t, null) + kappa u(x_t, t, t, y),

whose fixed point is classifier-free guidance of scale omega / (1 - kappa). The velocity of a
trained teacher, which does not learn this, is guided with that scale instead.

From the paper (Geng et al., arXiv 2505.13447) and its released code: all of the above, the
logit-normal times, the adaptive weight on the error summed over elements, 10 % label dropout with
unguided targets. Our reading: dropped labels fall on any row (the code drops them on the diagonal
rows). With `one_pass`, value and derivative share their dropout masks. With `dual`, which runs a
pass of its own, the derivative has masks of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Derivative,
    Draw,
    GuidanceLaw,
    LossOutput,
    Network,
    Path,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.derivatives.one_pass import OnePass
from zoo.guidance import guidance_share, velocity_at
from zoo.ops import first_rows, mean_flat, rms, sum_flat
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.identity import outputs_and_target
from zoo.points.velocities import (
    Conditional,
    check_mixture,
    check_velocity,
    guided_by,
    mixed_by,
)
from zoo.teachers import Online
from zoo.times import MEAN_FLOW, LogitNormalPair, SplitsSteps
from zoo.weighting import Adaptive


@objectives.register("mean_flow")
@dataclass(frozen=True, kw_only=True)
class MeanFlow(SplitsSteps):
    """Average-velocity regression through the MeanFlow identity; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = MEAN_FLOW

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=LogitNormalPair)
    velocity: VelocityEstimator = field(default_factory=Conditional)
    teacher: Teacher = field(default_factory=Online)
    derivative: Derivative = field(default_factory=OnePass)
    weight: Weight = field(default_factory=Adaptive)
    omega: float = 1.0
    kappa: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance: GuidanceLaw | None = None
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_mixture("mean_flow", self.kappa, self.guidance_interval)
        if self.guidance is not None and (self.omega, self.kappa) != (1, 0):
            raise ValueError(
                "mean_flow.guidance draws the scale of each row; leave mean_flow.omega = 1 and "
                "mean_flow.kappa = 0"
            )
        both = self.splits_batch
        check_velocity("mean_flow", self.velocity, teacher=self.teacher, anchors=both)

    @property
    def guidance_scale(self) -> float:
        return self.omega / (1 - self.kappa)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout, guidance=self.guidance)
        teacher = self.teacher(net)
        v = self._guided(teacher, d, rng)

        quota = self.times.num_off_diagonal(len(batch))
        k, derivative = batch.share.size(quota), self.derivative if quota else None
        first = d.x_t[:k], d.t[:k], first_rows(d.cond, k)
        along = self.velocity.along(v[:k], lambda: velocity_at(teacher, *first))
        v = torch.cat([along, v[k:]])
        out, target, du_dt = outputs_and_target(derivative, net, d, along, v)
        squares = (out["u"] - target) ** 2
        return LossOutput(
            per_sample=self.weight(sum_flat(squares), out),
            terms={"u": mean_flat(squares).detach()},
            diagnostics={"du_dt_rms": rms(du_dt)} if k else {},
            t=d.t,
            r=d.r,
        )

    def _guided(self, teacher: Network, d: Draw, rng: torch.Generator) -> Tensor:
        """v_g on the labelled rows inside the interval, v elsewhere."""
        distils, interval = self.teacher.distils, self.guidance_interval
        if self.guidance is None:
            mixture = self.omega, self.kappa, interval
            return mixed_by(self.velocity, d, teacher, rng, *mixture, distils=distils)
        share = guidance_share(d.cond, d.t)
        if distils:
            share = share / (1 - share)
        return guided_by(self.velocity, d, teacher, rng, share, interval=interval)
