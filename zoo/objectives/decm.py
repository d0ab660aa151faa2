"""DE-CM, dual-end consistency model: three clusters of (t, r) instead of the whole triangle.

    consistency     (t, 0)    g = u - v + t du,  du along (v, 1, 0)
    instantaneous   (t, t)    || u - v ||^2 + cosine distance
    noise-to-noisy  (t_n, r)  g = (lam + gamma) u - lam v2 - gamma v1 + (t_n - r) du,
                              du along (gamma v1, gamma, -lam);  t_n -> 1 in training

v1 = v(x, t_n) is the velocity at the noisy end, v2 = v(x_r, r) at the end that the network
predicts, x_r = sg[x - (t_n - r) u]. `gamma` moves t along a trajectory, `lam` moves r along the
velocity at the far end. With these tangents the true flow map is a fixed point for all lam, gamma.
The published reading prints them swapped in the tangents: a fixed point only where lam = gamma.

From a reading of the paper (Dong et al., arXiv 2602.10764): the clusters and losses, lam = 0.5,
gamma = 1, noise-to-noisy every 3rd step, t_n = 1 - 0.1 max(0, 1 - i / 20000), stratified times,
norm-limited guidance v(y) + (w - 1) min(1, eta / ||dv||) dv. Our reading: the consistency loss in
FACM's form (beta = sin(pi t / 2), a = 1 - sqrt(1 - t), root-error norm); w' = 1; clips at +-1;
||dv|| a root mean square; r of the noise-to-noisy rows is t_n times the time law; cosines are over
whole samples.

The paper distils a frozen teacher (`teacher = @frozen()`, cosine_weight = 1). Without one, the
default here and ours alone, v is the (guided) conditional velocity at the instantaneous rows and
elsewhere the network's own u(x, t, t) without gradient.

The clusters share one forward of 2 or 3 rows per sample. In forwards of the batch (flow matching:
3), a step costs 6 + 2 (derivative) + 1 (teacher, if distilled), every 3rd 9 + 4 + 2 (+ 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

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
)
from zoo.derivatives import Dual, derivative_of_u
from zoo.guidance import drop_labels, guided_target, guided_velocity
from zoo.ops import like, mean_flat, normal_like, repeat_rows
from zoo.paths import Linear
from zoo.teachers import Online
from zoo.times import Stratified


@objectives.register("decm")
@dataclass(frozen=True, kw_only=True)
class DECM:
    """Consistency, flow matching and noise-to-noisy maps together; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    samplers: ClassVar[tuple[str, ...]] = ("restart", "mix", "euler", "heun")
    reference: ClassVar = Reference(
        title="Dual-End Consistency Model", authors="Dong et al.", year=2026, arxiv="2602.10764"
    )

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=Stratified)
    teacher: Teacher = field(default_factory=Online)
    derivative: Derivative = field(default_factory=Dual)
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
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("n2n_every", "start_decay_steps", "lam", "gamma", "start_gap"):
            if getattr(self, name) < 0:
                raise ValueError(f"decm.{name} = {getattr(self, name)!r} must not be negative")
        if self.guidance_scale < 1:
            raise ValueError(f"decm.guidance_scale = {self.guidance_scale!r} must be at least 1")

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        n, x1 = len(batch), normal_like(batch.x0, rng)
        t, zero = self.times(n, rng)[0], torch.zeros(n, device=rng.device)
        cond, labelled = drop_labels(batch.cond, self.label_dropout, rng, n)
        with_n2n = self.n2n_every > 0 and batch.step % self.n2n_every == 0
        r = self.times(n, rng)[0] * self.start_time(batch.step) if with_n2n else zero
        x0, x1, t, r, zero, cond, labelled = batch.share.rows(
            batch.x0, x1, t, r, zero, cond, labelled
        )
        near = self.path.sample(x0, x1, t)
        rows = [(near.x_t, t, zero), (near.x_t, t, t)]
        if with_n2n:
            t_n = torch.full_like(t, self.start_time(batch.step))
            rows.append((self.path.sample(x0, x1, t_n).x_t, t_n, r))

        x, start, end = (torch.cat(column) for column in zip(*rows, strict=True))
        u = net(x, start, end, repeat_rows(cond, len(rows)))["u"].chunk(len(rows))
        teacher = self.teacher(net)
        if self.teacher.distils:
            v = anchor = self._velocity(teacher, near.x_t, t, cond)
        else:
            v = u[1].detach()
            share, limit = 1 - 1 / self.guidance_scale, self.guidance_limit
            anchor = guided_target(
                near.velocity, teacher, near.x_t, t, cond, labelled, share, limit
            )

        g = self._consistency_residual(net, near.x_t, t, cond, u[0].detach(), v)
        per_sample = self._consistency_loss(u[0], g, t)
        per_sample = per_sample + self.fm_weight * self._instantaneous_loss(u[1], anchor)
        terms = {"consistency": mean_flat(g**2), "v": mean_flat((u[1] - anchor) ** 2).detach()}
        if with_n2n:
            g = self._n2n_residual(net, teacher, *rows[2], cond, u[2].detach())
            target = (u[2] - g.clamp(-self.clip, self.clip)).detach()
            per_sample = per_sample + self.n2n_weight * mean_flat((u[2] - target) ** 2)
            terms["n2n"] = mean_flat(g**2)
        return LossOutput(per_sample=per_sample, terms=terms, t=t, r=zero)

    def start_time(self, step: int) -> float:
        """t_n, which rises from 1 - start_gap to exactly 1 over start_decay_steps."""
        return 1 - self.start_gap * max(0.0, 1 - step / max(self.start_decay_steps, 1))

    def _consistency_residual(
        self, net: Network, x: Tensor, t: Tensor, cond: Cond | None, u: Tensor, v: Tensor
    ) -> Tensor:
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        du = derivative_of_u(self.derivative, net, cond, (x, t, zero), (v, one, zero))
        return u - v + like(t, x) * du

    def _n2n_residual(
        self,
        net: Network,
        teacher: Network,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Cond | None,
        u: Tensor,
    ) -> Tensor:
        v1 = self._velocity(teacher, x, t, cond)
        v2 = self._velocity(teacher, x - like(t - r, x) * u, r, cond)
        one = torch.ones_like(t)
        tangents = (self.gamma * v1, self.gamma * one, -self.lam * one)
        du = derivative_of_u(self.derivative, net, cond, (x, t, r), tangents)
        return (self.lam + self.gamma) * u - self.lam * v2 - self.gamma * v1 + like(t - r, x) * du

    def _consistency_loss(self, u: Tensor, g: Tensor, t: Tensor) -> Tensor:
        """beta e / sg(e + 1e-3)^(1/2), e the error to a step of a(t) along -g; FACM's form."""
        step = like(1 - (1 - t).sqrt(), u) * g.clamp(-self.clip, self.clip)
        error = mean_flat((u - (u - step).detach()) ** 2)
        return torch.sin(math.pi / 2 * t) * error / (error.detach() + 1e-3).sqrt()

    def _instantaneous_loss(self, u: Tensor, anchor: Tensor) -> Tensor:
        cosine = cosine_similarity(u.flatten(1), anchor.flatten(1), dim=1)
        return mean_flat((u - anchor) ** 2) + self.cosine_weight * (1 - cosine)

    def _velocity(self, teacher: Network, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """The teacher's velocity, guided if it is distilled (else it has learned guidance)."""
        scale = self.guidance_scale if self.teacher.distils else 1.0
        return guided_velocity(teacher, x, t, cond, scale, self.guidance_limit)
