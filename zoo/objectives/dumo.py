"""DuMo, duality models: velocity and flow map from one forward of one backbone with two heads.

    v head   || v(x_t, t, r) - sg v_g ||^2                    on every row
    u head   || u(x_t, t, r) - sg[ u - clip(g) ] ||^2         on every row

g is a residual of the average velocity along a direction d (zoo/residuals.py): RCGM's finite
difference with an EMA teacher, or the exact derivative. The direction is the v head's own velocity,
or v_g. At the truth both losses are stationary for any positive clip, provided that d is a function
of (x_t, t). The v head's velocity is one, and so is a trained teacher's. The conditional velocity
is not, and an elementwise clip then moves the optimum towards its median.

    v_g = v_c + omega ( v(x_t, t, t, y) - v(x_t, t, t, null) )    scale 1 / (1 - omega)

Another `velocity` (zoo/points/velocities.py) takes the place of v_c.

The error of a few-step sample is bounded by both: along the v head's own trajectories
x_t - (t - r) u - X_v(x_t, t, r) = - int_r^t R d tau, with R the exact residual for d = v.

From the abstract (Sun et al., arXiv 2602.17682): one shared backbone, two heads predicting v and u
together, the multi-step constraint on every sample; 679M parameters, i.e. two time embedders and
two final layers. Everything else is our reading, after RCGM and TwinFlow of the same authors: the
residual and its order, the EMA of 0.999, the laws of t and r, the equal weights, the guidance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch

from registry import objectives
from registry.protocols import (
    Batch,
    GuidanceLaw,
    LossOutput,
    Network,
    Path,
    Reference,
    Residual,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.derivatives.one_pass import outputs_then_derivative
from zoo.guidance import check_interval, guidance_share
from zoo.ops import clipped, mean_flat, rms
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_velocity, guided_by
from zoo.residuals import Exact, Rcgm
from zoo.teachers import EmaTeacher
from zoo.times import BetaPair, DrawsSteps
from zoo.weighting import Unweighted

Direction = Literal["head", "guided"]
ClipBy = Literal["element", "rms"]


@objectives.register("dumo")
@dataclass(frozen=True, kw_only=True)
class DuMo(DrawsSteps):
    """Dual heads: velocity and average velocity from one forward, both trained on every row."""

    heads: ClassVar[tuple[str, ...]] = ("u", "v")
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = Reference(
        title="Duality Models: An Embarrassingly Simple One-step Generation Paradigm",
        authors="Sun et al.",
        year=2026,
        arxiv="2602.17682",
    )
    exact_with: ClassVar = {"residual": Exact()}  # rcgm's bias at the truth is O(delta)

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=BetaPair)
    residual: Residual = field(default_factory=Rcgm)
    teacher: Teacher = field(default_factory=EmaTeacher)
    velocity: VelocityEstimator = field(default_factory=Conditional)
    direction: Direction = "head"
    clip: float = 1.0
    clip_by: ClipBy = "element"
    weight_v: Weight = field(default_factory=Unweighted)
    weight_u: Weight = field(default_factory=Unweighted)
    lambda_u: float = 1.0
    omega: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance: GuidanceLaw | None = None
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_interval("dumo.guidance_interval", self.guidance_interval)
        if self.guidance is not None and self.omega:
            raise ValueError("dumo.guidance draws the scale of each row; leave dumo.omega = 0")
        if not 0 <= self.omega < 1:
            raise ValueError(
                f"dumo.omega = {self.omega!r} must lie in [0, 1): the guidance scale is "
                "1 / (1 - omega), and training diverges where omega >= 1"
            )
        for name, value, kind in (
            ("direction", self.direction, Direction),
            ("clip_by", self.clip_by, ClipBy),
        ):
            if value not in get_args(kind):
                raise ValueError(f"dumo.{name} = {value!r}; allowed: {', '.join(get_args(kind))}")
        check_velocity("dumo", self.velocity, teacher=self.teacher, asks_for_maps=True)

    @property
    def guidance_scale(self) -> float:
        return 1 / (1 - self.omega)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        p = draw(batch, rng, self.path, self.times, self.label_dropout, guidance=self.guidance)
        teacher = self.teacher(net)
        share = self.omega if self.guidance is None else guidance_share(p.cond, p.t)
        share = share / (1 - share) if self.teacher.distils else share
        interval = self.guidance_interval
        v_g = guided_by(self.velocity, p, teacher, rng, share, interval=interval)

        point = (p.x_t, p.t, p.r)
        out, du_along = outputs_then_derivative(self.residual.derivative, net, p.cond, point)
        u, v = out["u"], out["v"]
        head = v.detach()
        d = head if self.direction == "head" else self.velocity.along(v_g, lambda: head)
        g = self.residual(du_along, teacher, *point, p.cond, u.detach(), d)
        target = (u - clipped(g, self.clip, self.clip_by)).detach()

        error_v, error_u = mean_flat((v - v_g) ** 2), mean_flat((u - target) ** 2)
        loss_v, loss_u = self.weight_v(error_v, out), self.weight_u(error_u, out)
        return LossOutput(
            per_sample=loss_v + self.lambda_u * loss_u,
            terms={"v": error_v.detach(), "u": error_u.detach()},
            diagnostics={"residual_rms": rms(g)},
            t=p.t,
            r=p.r,
        )
