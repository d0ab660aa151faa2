"""SoFlow: the solution function of the flow's ODE, learned without a derivative of the network.

    v rows (75 %)   || u(x_t, t, t) - v_g ||^2
    u rows (25 %)   || u(x_t, t, r) - sg[ u - g ] ||^2,
                    g = ((t - r) u - (l - r) u(x_l, l, r)) / (t - l) - v_g,  x_l = x_t - (t - l) v_g

g is minus the difference quotient of the solution X(x, t, r) = x - (t - r) u(x, t, r) between the
times t and l, r <= l < t, along the velocity. As l -> t it tends to MeanFlow's residual, and its
mean over the data given x_t vanishes at the true solution up to O(t - l). The distance is a share
of t - r that falls over the run:

    t - l = rho (t - r),   rho from `first_share` to `last_share`, exponentially

Guidance of scale w replaces the conditional velocity v_c, where the row has its label, by

    v_g = m (v_c + k(t) (w - 1) (v_c - u(x_t, t, t, null))) + (1 - m) u(x_t, t, t, y)

whose fixed point is classifier-free guidance of scale 1 + k (w - 1). k is 1 up to t = `fade`, and
falls smoothly to 0 at t = 1.

From the paper (Luo et al., arXiv 2512.15657) and its released code: all of the above, the laws of
t and r, the weight 1 / (mean squared error + 0.01) of both losses, and their scale: the gradient of
a u row is that of half the squared error (`weight_u`). For CIFAR-10 the code has u rows alone, rho
from 1 to 0.0003, and the same dropout masks for both evaluations. The solution is in Euler's form,
x - (t - r) u, as in the paper's experiments; the trigonometric form of its code is not here. Our
reading: labels are dropped on any row. On the same draws, in float64, the gradient differs from the
code's by 5e-13 (256 cases), where it divides by steps of down to 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Draw,
    LossOutput,
    Network,
    Path,
    Teacher,
    TimeLaw,
    Weight,
)
from registry.ranges import Probability
from zoo.dropout import shares_dropout
from zoo.guidance import unlabelled
from zoo.ops import first_rows, like, mean_flat, terms_of
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.residuals import two_step_residual
from zoo.teachers import Online, without_gradient
from zoo.times import SOFLOW, DrawsSteps, TwoLogitNormals, check_fraction
from zoo.weighting import Adaptive

SHORTEST = 1e-4  # t - l, as in the released code


@objectives.register("so_flow")
@dataclass(frozen=True, kw_only=True)
class SoFlow(DrawsSteps):
    """The solution of the ODE from t to r, by a difference quotient along it; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = SOFLOW
    exact_with: ClassVar = {"first_share": 1e-3, "last_share": 1e-3}  # the bias is O(t - l)

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=TwoLogitNormals)
    teacher: Teacher = field(default_factory=Online)
    weight: Weight = field(default_factory=Adaptive)
    weight_u: float = 0.5
    first_share: float = 0.1
    last_share: float = 0.002
    guidance_scale: float = 1.0
    guidance_mix: float = 0.25
    fade: float = 0.8
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_fraction("so_flow.fade", self.fade)
        for name in ("first_share", "last_share", "guidance_mix"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"so_flow.{name} = {getattr(self, name)!r} must lie in (0, 1]")
        if self.guidance_scale < 1:
            raise ValueError(f"so_flow.guidance_scale = {self.guidance_scale!r} must be >= 1")
        n = 64  # like any number of rows
        if shares_dropout(self.teacher) and self.times.num_off_diagonal(n) < n:
            raise ValueError(
                "so_flow.teacher has dropout = 'shared', and so_flow.times draws r < t for some of "
                "the rows alone: targets of these rows would not have the masks of the prediction. "
                "Set dropout = 'off', or draw r < t in every row (off_diagonal_fraction = 1.0)"
            )

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        k, v = batch.share.size(self.times.num_off_diagonal(len(batch))), self._guided(net, d)

        out = net(d.x_t, d.t, d.r, d.cond)
        u, point, given = out["u"], (d.x_t[:k], d.t[:k], d.r[:k]), first_rows(d.cond, k)
        gap = d.t[:k] - d.r[:k]
        step = torch.minimum((self.share(batch.progress) * gap).clamp_min(SHORTEST), gap)
        g = two_step_residual(self.teacher(net), point, step, given, u[:k].detach(), v[:k])
        target = torch.cat([u[:k] - g, v[k:]]).detach()
        error = mean_flat((u - target) ** 2)
        factor = torch.ones_like(error)
        factor[:k] = self.weight_u
        return LossOutput(
            per_sample=factor * self.weight(error, out),
            terms=terms_of(u=error[:k], v=error[k:]),
            t=d.t,
            r=d.r,
        )

    def share(self, progress: float) -> float:
        """rho, the share of t - r that l is from t."""
        return float(self.first_share * (self.last_share / self.first_share) ** progress)

    def _guided(self, net: Network, d: Draw) -> Tensor:
        """v_g on the labelled rows, v_c elsewhere."""
        v_c, x, t = d.velocity, d.x_t, d.t
        if self.guidance_scale == 1:
            return v_c
        model, far = without_gradient(net), ((1 - t) / max(1 - self.fade, 1e-6)).clamp(0, 1 - 1e-6)
        k = torch.where(t <= self.fade, 1, 1 - torch.exp(-0.025 * far / (1 - far)))
        extra = like(k, x) * (self.guidance_scale - 1)
        v_g = v_c + extra * (v_c - model(x, t, t, unlabelled(d.cond))["u"])
        if self.guidance_mix < 1:
            own = model(x, t, t, d.cond)["u"]
            v_g = self.guidance_mix * v_g + (1 - self.guidance_mix) * own
        return torch.where(like(d.labelled, x), v_g, v_c)
