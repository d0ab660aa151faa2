"""DE-CM, dual-end consistency model: three clusters of (t, r) instead of the whole triangle.

    consistency     (t, 0)    g = u - v + t du,  du along (v, 1, 0)
    instantaneous   (t, t)    || u - v ||^2 + cosine distance
    noise-to-noisy  (t_n, r)  g = (lam + gamma) u - lam v2 - gamma v1 + (t_n - r) du,
                              du along (gamma v1, gamma, -lam);  t_n -> 1 in training

v1 = v(x, t_n) is the velocity at the noisy end, v2 = v(x_r, r) at the end that the network
predicts, x_r = sg[x - (t_n - r) u]. `gamma` moves t along a trajectory, `lam` moves r along the
velocity at the far end. With these tangents the true flow map is a fixed point for all lam, gamma.

They are equation (15) of the paper, gamma df/dt - lam df/dr + lam v(f, r) in our times, where
f = x - (t - r) u is the map: the paper's clock runs backwards and its names of both ends are
exchanged. Along a trajectory df/dt = v1 - u - (t - r) (du/dt + v1 du/dx), and df/dr = u - (t - r)
du/dr. So the sum is -g, with the derivative of u along (gamma v1, gamma, -lam).

The instantaneous loss has the mean over positions of 1 - cos(u, v), each cosine over the channels
(axis 1) of one position, as in FACM's released code. A sample that is a vector has one position.
With one channel a cosine is the sign of u v, and this loss moves no weight.

From a reading of the paper (Dong et al., arXiv 2602.10764): the clusters and losses, lam = 0.5,
gamma = 1, noise-to-noisy every 3rd step, t_n = 1 - 0.1 max(0, 1 - i / 20000), stratified times,
norm-limited guidance v(y) + (w - 1) min(1, eta / ||dv||) dv. From FACM's code (Peng et al., arXiv
2507.03738), which the paper builds on: the cosine over channels, and the form of the consistency
loss (beta = sin(pi t / 2), a = 1 - sqrt(1 - t), root-error norm, clip at +-1). Our reading: that
DE-CM takes both over; w' = 1 and a clip at +-1 in the noise-to-noisy loss; ||dv|| a root mean
square; r of the noise-to-noisy rows is t_n times the time law.

The paper distils a frozen teacher (`teacher = @frozen()`, cosine_weight = 1). The default here,
which is ours alone, has no such teacher: v is the (guided) conditional velocity at the
instantaneous rows, and the network's own u(x, t, t) without gradient elsewhere. Another `velocity`
(zoo/points/velocities.py) is for the first two clusters; v1 and v2 are always a network's. Where it
is no function of (x_t, t), as the conditional one, the clip moves the optimum.

Each cluster has a forward pass of its own, which gives its derivative too, since the velocity of
one is the tangent of the next. In forward passes of the batch, of which flow matching takes 3, a
step costs 6 + 1 (derivative) + 1 (teacher, if distilled), and every 3rd step 9 + 2 + 2 (+ 1). By
`dual` the derivatives cost 2 and 4 instead of 1 and 2.
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
    Derivative,
    LossOutput,
    Network,
    Path,
    Reference,
    Teacher,
    TimeLaw,
    VelocityEstimator,
)
from registry.ranges import Probability
from zoo.anchored import anchor, map_to_data, relaxed_consistency
from zoo.derivatives.one_pass import OnePass, outputs_and_derivative
from zoo.guidance import guided_velocity
from zoo.ops import like, mean_flat
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import FromTeacher, Own, check_velocity, guided_by
from zoo.teachers import Online
from zoo.times import Stratified, law_at


@objectives.register("decm")
@dataclass(frozen=True, kw_only=True)
class DECM:
    """Consistency, flow matching and noise-to-noisy maps together; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    reference: ClassVar = Reference(
        title="Dual-End Consistency Model", authors="Dong et al.", year=2026, arxiv="2602.10764"
    )

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=Stratified)
    teacher: Teacher = field(default_factory=Online)
    velocity: VelocityEstimator | None = None  # a trained teacher's, or else the network's own
    derivative: Derivative = field(default_factory=OnePass)
    lam: float = 0.5
    gamma: float = 1.0
    n2n_every: int = 3  # 0 switches the noise-to-noisy cluster off
    n2n_weight: float = 1.0
    fm_weight: float = 1.0
    start_gap: float = 0.1
    start_decay_steps: int = 20_000
    clip: float = 1.0
    cosine_weight: float = 0.0
    guidance_scale: float = 1.0
    guidance_limit: float = math.inf
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        for name in ("n2n_every", "start_decay_steps", "lam", "gamma", "start_gap"):
            if getattr(self, name) < 0:
                raise ValueError(f"decm.{name} = {getattr(self, name)!r} must not be negative")
        if self.guidance_scale < 1:
            raise ValueError(f"decm.guidance_scale = {self.guidance_scale!r} must be at least 1")
        check_velocity("decm", self._estimator, teacher=self.teacher)

    @property
    def trains(self) -> tuple[str, ...]:
        """map_to_data, velocity, and map_from_noise unless n2n_every or n2n_weight is 0."""
        from_noise = ("map_from_noise",) if self.n2n_every and self.n2n_weight else ()
        return ("map_to_data", *from_noise, "velocity")

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        x, t, cond, w = d.x_t, d.t, d.cond, self.guidance_scale
        velocity, teacher = self._estimator, self.teacher(net)
        u = net(x, t, t, cond)["u"]
        share = w - 1 if self.teacher.distils else 1 - 1 / w
        v_g = guided_by(velocity, d, teacher, rng, share, limit=self.guidance_limit)
        v = velocity.along(v_g, lambda: u)

        out, g = map_to_data(self.derivative, net, x, t, cond, v)
        loss = relaxed_consistency(out["u"], g, t, self.clip)
        per_sample = loss + self.fm_weight * anchor(u, v_g, self.cosine_weight)
        terms = {"consistency": mean_flat(g**2), "v": mean_flat((u - v_g) ** 2).detach()}
        if self.n2n_every > 0 and batch.step % self.n2n_every == 0:
            start = self.start_time(batch.step)
            (ends,) = batch.share.rows(law_at(self.times, batch.step)(len(batch), rng)[0])
            t_n = torch.full_like(t, start)
            noisy = self.path.sample(d.x0, d.x1, t_n)
            loss, g = self._noise_to_noisy(net, teacher, noisy.x_t, t_n, ends * start, cond)
            per_sample = per_sample + self.n2n_weight * loss
            terms["n2n"] = mean_flat(g**2)
        return LossOutput(per_sample=per_sample, terms=terms, t=t, r=torch.zeros_like(t))

    def trains_step(self, t: float, r: float) -> bool:
        """Whether (t, r) lies in a cluster: to the data, on the diagonal, or from the noise."""
        from_noise = self.n2n_every > 0 and t >= 1 - self.start_gap - 1e-6
        return r <= 1e-6 or t - r <= 1e-6 or from_noise

    def start_time(self, step: int) -> float:
        """t_n, which rises from 1 - start_gap to exactly 1 over start_decay_steps."""
        return 1 - self.start_gap * max(0.0, 1 - step / max(self.start_decay_steps, 1))

    @property
    def _estimator(self) -> VelocityEstimator:
        return self.velocity or (FromTeacher() if self.teacher.distils else Own())

    def _noise_to_noisy(
        self, net: Network, teacher: Network, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None
    ) -> tuple[Tensor, Tensor]:
        """The loss of the map from noise to r, and its residual."""
        lam, gamma, one = self.lam, self.gamma, torch.ones_like(t)
        v1 = self._velocity(teacher, x, t, cond)
        tangents = (gamma * v1, gamma * one, -lam * one)
        out, du = outputs_and_derivative(self.derivative, net, cond, (x, t, r), tangents)
        u, gap = out["u"], like(t - r, x)
        v2 = self._velocity(teacher, x - gap * u.detach(), r, cond)
        g = (lam + gamma) * u.detach() - lam * v2 - gamma * v1 + gap * du
        target = (u - g.clamp(-self.clip, self.clip)).detach()
        return mean_flat((u - target) ** 2), g

    def _velocity(self, teacher: Network, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """The teacher's velocity; guided if it is distilled, else it has learned the guidance."""
        scale = self.guidance_scale if self.teacher.distils else 1.0
        return guided_velocity(teacher, x, t, cond, scale, self.guidance_limit)
