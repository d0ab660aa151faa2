"""FACM: a consistency model whose network learns the flow as well, which anchors it.

    flow          || u(x_t, t, t) - v ||^2 + cosine distance
    consistency   || u(x_t, t, 0) - sg[ u - a(t) clip(g) ] ||^2,    g = u - v + t du/dt,

each on every row of the batch. g is MeanFlow's residual with r = 0, du/dt runs along (v, 1, 0), and
it vanishes where x_t - t u(x_t, t, 0) is the same at every point of a trajectory. With

    a(t) = 1 - (1 - t)^relaxation

the target is a step towards zero residual that is small near the data. The consistency loss has the
weight sin(pi t / 2) and is divided by the root of its own size, e / sg(e + 1e-3)^(1/2).

From the paper (Peng et al., arXiv 2507.03738) and its released code: all of the above, the law of
t, relaxation 1/2, the clip at +-1, and v. The paper distils: v is the velocity of a trained flow,
whose weights the student starts from, with guidance of scale w = 1.75 where t <= 0.875,

    v + (w - 1) (v - v(null)),    without dropped labels.

The code trains without a teacher as well. Then v is the conditional velocity, and v(null) that of
the network itself: the fixed point is again guidance of scale w. This is the default here, since a
teacher must be named, and labels are dropped in 10 % of the rows, which the code's settings do not.
Where t > 0.875 the code replaces v(null) by the network's v(y); v is left alone here, which has the
same fixed point. With the conditional velocity the clip and the cosine move the optimum.

The network is told by r which of the two it computes: r = t for the flow, and r = 0 for the map.
The code offers this, and by default another way for a network that sees a single time: the flow is
asked for at t' = -t, outside the times of the map ("expanded time interval"). Networks here have
two times, so that this way is not built.

On the same draws, loss and gradient are those of the released code to 3e-16 (36 cases, float64).

In forward passes of the batch, of which flow matching takes 3, a step costs 6 + 1 (derivative) + 1
(teacher) + 1 (guidance).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from registry import objectives
from registry.protocols import (
    Batch,
    Derivative,
    LossOutput,
    Network,
    Path,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.anchored import anchor, map_to_data, relaxed_error, towards_noise
from zoo.derivatives.one_pass import OnePass
from zoo.guidance import check_interval, guided_target, inside
from zoo.ops import mean_flat
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_velocity
from zoo.teachers import Online
from zoo.times import FLOW_ANCHORED, ArctanNormal
from zoo.weighting import Adaptive


@objectives.register("facm")
@dataclass(frozen=True, kw_only=True)
class FACM:
    """A consistency map to the data, anchored by flow matching in the same network; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map_to_data", "velocity")
    reference: ClassVar = FLOW_ANCHORED

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=ArctanNormal)
    velocity: VelocityEstimator = field(default_factory=Conditional)
    teacher: Teacher = field(default_factory=Online)
    derivative: Derivative = field(default_factory=OnePass)
    weight: Weight = field(default_factory=lambda: Adaptive(power=0.5, offset=1e-3))
    relaxation: float = 0.5
    clip: float = 1.0
    cosine_weight: float = 1.0
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 0.875)
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_interval("facm.guidance_interval", self.guidance_interval)
        for name in ("relaxation", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"facm.{name} = {getattr(self, name)!r} must be positive")
        if self.guidance_scale < 1:
            raise ValueError(f"facm.guidance_scale = {self.guidance_scale!r} must be at least 1")
        check_velocity("facm", self.velocity, teacher=self.teacher)

    @property
    def exact_with(self) -> Mapping[str, Any]:
        """No clip and no cosine, where v is no function of (x_t, t)."""
        return {} if self.teacher.distils else {"clip": math.inf, "cosine_weight": 0.0}

    def trains_step(self, t: float, r: float) -> bool:
        """Whether the step leads to the data, or has no length."""
        return r <= 1e-6 or t - r <= 1e-6

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        x, t, cond, teacher = d.x_t, d.t, d.cond, self.teacher(net)
        u = net(x, t, t, cond)["u"]
        v = self.velocity.target(d, teacher, rng)
        rows, share = d.labelled & inside(t, self.guidance_interval), self.guidance_scale - 1
        v = guided_target(v, teacher, x, t, cond, rows, share, with_label=v)

        along = self.velocity.along(v, lambda: u)
        out, g = map_to_data(self.derivative, net, x, t, cond, along)
        error = relaxed_error(out["u"], g, t, self.clip, self.relaxation)
        consistency = towards_noise(t) * self.weight(error, out)
        return LossOutput(
            per_sample=consistency + anchor(u, v, self.cosine_weight),
            terms={"consistency": mean_flat(g**2), "v": mean_flat((u - v) ** 2).detach()},
            t=t,
            r=torch.zeros_like(t),
        )
