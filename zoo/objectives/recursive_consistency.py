"""RCGM: a step of the map must agree with a short step of the flow and N steps of the map.

    || u(x_t, t, r) - sg[ u - clip(g) ] ||^2 on every row
    g = ((t - r) u - D) / (t - m) - v_g,   m = max(t - delta, r)

D is the displacement of N steps of an averaged network from x_t - (t - m) v_g at m to r: the
residual `rcgm` (zoo/residuals.py). For N = 1 this is a consistency model between any two times, or
MeanFlow by a finite difference; with a larger N a mistake of the long steps decays faster. Rows
with t - r <= delta are flow matching.

    v_g = v_c + omega ( u(x_t, t, t, y) - u(x_t, t, t, null) )     scale 1 / (1 - omega)

From the paper (Sun and Lin, "Any-step Generation via N-th Order Recursive Consistent Velocity Field
Estimation"), as notes on it and the code of TwinFlow by the same authors show it: the target, N =
2, delta = 0.01, the clip by element, the average of 0.999, r uniform below t. From that code, and
perhaps newer than the paper: the factor 1 + tan(2 pi (1 - t + r) / 5) and, to half a percent, the
weight error / sqrt(error + 1e-6). Our reading: t - m in both places, where the code moves by delta
and masks short steps; no row on the diagonal; labels dropped in 10 % of the rows. On the same
draws, in float64, loss and gradient differ from those of that code by 8e-16 (96 cases, unweighted).

v_g is the conditional velocity. So the true map is stationary up to O(delta), and the clip moves it
towards a median. DuMo (zoo/objectives/dumo.py) has the same target with a velocity head beside it.
The name `rcgm` is that of the residual, and names are unique over all kinds of parts.
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
    LossOutput,
    Network,
    Path,
    Residual,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.ops import rms
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_velocity, guided_by
from zoo.residuals import Exact, Rcgm, consistency_error, short_step_factor
from zoo.teachers import EmaTeacher
from zoo.times import BetaPair, DrawsSteps
from zoo.weighting import Adaptive


@objectives.register("recursive_consistency")
@dataclass(frozen=True, kw_only=True)
class RecursiveConsistency(DrawsSteps):
    """RCGM: the map against a short step and N steps of its own average; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = Rcgm.reference
    exact_with: ClassVar = {"residual": Exact(), "clip": math.inf}  # rcgm's bias is O(delta)

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=lambda: BetaPair(off_diagonal_fraction=1.0))
    velocity: VelocityEstimator = field(default_factory=Conditional)
    residual: Residual = field(default_factory=Rcgm)
    teacher: Teacher = field(default_factory=EmaTeacher)
    weight: Weight = field(default_factory=lambda: Adaptive(power=0.5, offset=1e-6))
    favours_short_steps: bool = True
    clip: float = 1.0
    omega: float = 0.0
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.omega < 1:
            raise ValueError(
                f"recursive_consistency.omega = {self.omega!r} must lie in [0, 1): the guidance "
                "scale is 1 / (1 - omega), and training diverges where omega >= 1"
            )
        check_velocity(
            "recursive_consistency",
            self.velocity,
            teacher=self.teacher,
            anchors=False,
            asks_for_maps=True,
        )

    @property
    def guidance_scale(self) -> float:
        return 1 / (1 - self.omega)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        teacher, point = self.teacher(net), (d.x_t, d.t, d.r)
        v_g = guided_by(self.velocity, d, teacher, rng, self.omega)

        out, error, g = consistency_error(
            self.residual, net, teacher, point, d.cond, v_g, self.clip
        )
        return LossOutput(
            per_sample=self.factor(d.t - d.r) * self.weight(error, out),
            terms={"u": error.detach()},
            diagnostics={"residual_rms": rms(g)},
            t=d.t,
            r=d.r,
        )

    def factor(self, gap: Tensor) -> Tensor:
        """The factor [b] of a row's loss: from 1 at t - r = 1 to 4.1 at t - r = 0."""
        if not self.favours_short_steps:
            return torch.ones_like(gap)
        return short_step_factor(gap)
