"""sCM: a consistency model in continuous time, on the circle between data and noise.

    y = cos(phi) x0 + s sin(phi) x1,    f = cos(phi) y - s sin(phi) F(y / s, phi),    s = sigma_data

f is the map to the data, which is constant along a trajectory. So F is moved along the tangent
cos(phi) df/dphi, in units of its own length:

    e^-w / sigma mean (F - sg[F + g / (||g|| + c)])^2 + w,       w(phi) learned
    g = -cos^2(phi) (s F - dy/dphi) - rho cos(phi) sin(phi) (y + s dF/dphi)

sigma = s tan(phi) is the noise level. rho rises from 0 to 1 over `warmup`; at 0, f is trained as
the denoiser. Training (sCT) takes the conditional velocity, distillation (sCD) a trained teacher's:
velocity = @teacher() and teacher = @frozen().

Here the network gives u, and f = x - t u(x, t, 0), on any path x_t = alpha x0 + sigma x1. The point
on the circle is a multiple of x, y = cos(phi) x / alpha, with tan(phi) = sigma / (s alpha). So F =
(cos(phi) y - f) / (s sin(phi)), and with phi' = dphi/dt

    F - sg F                     = t / (s sin(phi)) (u - sg u)
    cos(phi) df/dphi             = cos(phi) / phi' (v - u - t du/dt)
    -cos^2(phi) (s F - dy/dphi)  = cos^2(phi) / sin(phi) (f - x0),    x0 the data that v points to

The second line is MeanFlow's residual at r = 0 with the other sign: g is negative where u is too
large. It is g for rho = 1, and the third line is g for rho = 0.

From the paper (Lu and Song, arXiv 2410.11081): all of the above, c = 0.1, log sigma ~ N(-1, 1.4^2),
clipping to +-1 as the other tangent, 10,000 steps of warm-up. On 72 forced draws, of sCT and sCD on
two paths, losses and gradients equal those of FastGen's code to 2e-15, but for a constant: it has
the mean over elements, divided by their number, which shifts w. As there, ||g|| is the root mean
square. Our reading: the warm-up is a share of the run, here 10,000 of 400,000 steps. The
network of the paper has run.parametrisation = @trig(); FastGen's, which starts from EDM's weights,
has path = @linear(), times = @logit_normal() with the same mean and std, and @edm().

The normalised tangent, with the conditional velocity, moves the optimum from a mean to a median.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Derivative,
    Draw,
    LossOutput,
    Network,
    Path,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Positive, Probability
from zoo.derivatives.one_pass import OnePass, outputs_and_derivative
from zoo.ops import clipped, like, mean_flat, normalised, rms
from zoo.paths import Angle, TrigFlow, angle_on
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_teachers_scale, check_velocity, guided_by
from zoo.teachers import Online
from zoo.times import ArctanNormal, check_positive, law_at
from zoo.times.noise_levels import off_the_ends
from zoo.weighting import LearnedLogvar

Tangent = Literal["normalised", "clipped", "raw"]


@objectives.register("trig_consistency")
@dataclass(frozen=True, kw_only=True)
class TrigConsistency:
    """The map to the data, constant along trajectories (sCT and sCD); one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map_to_data",)
    reference: ClassVar = TrigFlow.reference
    exact_with: ClassVar = {"tangent": "raw", "warmup": 0.0, "divides_by_level": False}

    path: Path = field(default_factory=TrigFlow)
    times: TimeLaw = field(default_factory=lambda: ArctanNormal(mean=-1.0, std=1.4))
    velocity: VelocityEstimator = field(default_factory=Conditional)
    teacher: Teacher = field(default_factory=Online)
    derivative: Derivative = field(default_factory=OnePass)
    weight: Weight = field(default_factory=LearnedLogvar)
    sigma_data: Positive = 0.5
    divides_by_level: bool = True
    warmup: Probability = 0.025  # the share of the run over which rho rises to 1
    tangent: Tangent = "normalised"
    offset: Positive = 0.1  # c
    guidance_scale: float = 1.0
    label_dropout: Probability = 0.0

    def __post_init__(self) -> None:
        if self.tangent not in get_args(Tangent):
            allowed = ", ".join(map(repr, get_args(Tangent)))
            raise ValueError(f"trig_consistency.tangent = {self.tangent!r}; allowed: {allowed}")
        for name in ("sigma_data", "offset"):
            check_positive(f"trig_consistency.{name}", getattr(self, name))
        check_velocity("trig_consistency", self.velocity, teacher=self.teacher, anchors=False)
        check_teachers_scale("trig_consistency", self.guidance_scale, self.teacher)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        def times(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            t = off_the_ends(law_at(self.times, batch.step)(n, rng)[0])
            return t, torch.zeros_like(t)

        d = draw(batch, rng, self.path, times, self.label_dropout)
        v = guided_by(self.velocity, d, self.teacher(net), rng, self.guidance_scale - 1)
        point, tangents = (d.x_t, d.t, d.r), (v, torch.ones_like(d.t), d.r)
        out, du_dt = outputs_and_derivative(self.derivative, net, d.cond, point, tangents)

        phi = angle_on(self.path, d.t, self.sigma_data)
        g = self._tangent(d, phi, v, out["u"].detach(), du_dt, self.rho(batch.progress))
        slope = d.t / (self.sigma_data * phi.sin)  # dF/du
        target = (out["u"] + self._limited(g) / like(slope, g)).detach()
        error = mean_flat(like(slope, g) ** 2 * (out["u"] - target) ** 2)
        level = self.sigma_data * phi.sin / phi.cos if self.divides_by_level else 1
        return LossOutput(
            per_sample=self.weight((error / level).to(g.dtype), out),
            terms={"tangent": mean_flat(g**2)},
            diagnostics={"du_dt_rms": rms(du_dt)},
            t=d.t,
            r=d.r,
        )

    def rho(self, progress: float) -> float:
        """The share of the second part of the tangent, at this share of the run."""
        return min(progress / self.warmup, 1.0) if self.warmup else 1.0

    def _tangent(
        self, d: Draw, phi: Angle, v: Tensor, u: Tensor, du_dt: Tensor, rho: float
    ) -> Tensor:
        """g [b *d], before its length is changed."""
        t = like(d.t, u)
        whole = like(phi.cos / phi.d_dt, u) * (v - u - t * du_dt)
        to_data = d.x_t - t * u - self.path.to_x0(d.x_t, v, d.t)
        return torch.lerp(like(phi.cos**2 / phi.sin, u) * to_data, whole, rho)

    def _limited(self, g: Tensor) -> Tensor:
        if self.tangent == "normalised":
            return normalised(g, self.offset)
        return clipped(g, 1.0, "element") if self.tangent == "clipped" else g
