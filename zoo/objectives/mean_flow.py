"""MeanFlow: regress the average velocity onto its own differential identity.

    u(x_t, t, r) = v(x_t, t) - (t - r) d/dt u(x_t, t, r)

The total derivative runs along the path, so its tangents are (v, 1, 0) for (x, t, r). With the
conditional velocity in place of v the identity holds in expectation over x_t. Rows with r = t are
plain flow matching, so only the rows with r < t (25 %) pay for the derivative.

Guidance during training replaces the conditional velocity v_c, inside an interval of t, by

    v_g = omega v_c + (1 - omega - kappa) u(x_t, t, t, null) + kappa u(x_t, t, t, y),

whose fixed point is classifier-free guidance of scale omega / (1 - kappa).

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
    Cond,
    Derivative,
    GuidanceLaw,
    LossOutput,
    Network,
    Path,
    Reference,
    TimeLaw,
    Weight,
)
from registry.ranges import Probability
from zoo.derivatives.one_pass import OnePass, outputs_and_derivative
from zoo.guidance import (
    check_interval,
    drop_labels,
    guidance_share,
    guided_target,
    inside,
    unlabelled,
    with_guidance,
)
from zoo.ops import like, mean_flat, normal_like, rms, sum_flat
from zoo.paths import Linear
from zoo.teachers import without_gradient
from zoo.times import LogitNormalPair, reaches
from zoo.weighting import Adaptive


@objectives.register("mean_flow")
@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """Average-velocity regression through the MeanFlow identity; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = Reference(
        title="Mean Flows for One-step Generative Modeling",
        authors="Geng et al.",
        year=2025,
        arxiv="2505.13447",
    )

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=LogitNormalPair)
    derivative: Derivative = field(default_factory=OnePass)
    weight: Weight = field(default_factory=Adaptive)
    omega: float = 1.0
    kappa: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance: GuidanceLaw | None = None
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_interval("mean_flow.guidance_interval", self.guidance_interval)
        if self.guidance is not None and (self.omega, self.kappa) != (1, 0):
            raise ValueError(
                "mean_flow.guidance draws the scale of each row; leave mean_flow.omega = 1 and "
                "mean_flow.kappa = 0"
            )
        if not 0 <= self.kappa < 1:
            raise ValueError(f"mean_flow.kappa = {self.kappa!r} must lie in [0, 1)")

    @property
    def guidance_scale(self) -> float:
        return self.omega / (1 - self.kappa)

    def trains_step(self, t: float, r: float) -> bool:
        """Whether the time law draws such a step."""
        return reaches(self.times, t, r)

    @property
    def splits_batch(self) -> bool:
        n = 64  # like any number of rows
        return 0 < self.times.num_off_diagonal(n) < n

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        n, x1 = len(batch), normal_like(batch.x0, rng)
        t, r = self.times(n, rng)
        cond, labelled = drop_labels(batch.cond, self.label_dropout, rng, n)
        if self.guidance is not None:
            cond = with_guidance(cond, self.guidance, r == t, rng)
        x0, x1, t, r, cond, labelled = batch.share.rows(batch.x0, x1, t, r, cond, labelled)
        sample = self.path.sample(x0, x1, t)
        v = self._guided(net, sample.x_t, t, cond, labelled, sample.velocity)

        quota = self.times.num_off_diagonal(n)
        k, derivative = batch.share.size(quota), self.derivative if quota else None
        point, along = (sample.x_t, t, r), (v[:k], torch.ones_like(t[:k]), torch.zeros_like(r[:k]))
        out, du_dt = outputs_and_derivative(derivative, net, cond, point, along)
        correction = like(t[:k] - r[:k], du_dt) * du_dt
        target = torch.cat([v[:k] - correction, v[k:]]).detach()

        squares = (out["u"] - target) ** 2
        return LossOutput(
            per_sample=self.weight(sum_flat(squares), out),
            terms={"u": mean_flat(squares).detach()},
            diagnostics={"du_dt_rms": rms(du_dt)} if k else {},
            t=t,
            r=r,
        )

    def _guided(
        self, net: Network, x: Tensor, t: Tensor, cond: Cond | None, labelled: Tensor, v_c: Tensor
    ) -> Tensor:
        """v_g on the labelled rows inside the interval, v_c elsewhere."""
        model = without_gradient(net)
        if self.guidance is not None and cond is not None:
            share = guidance_share(cond, t)
            return guided_target(v_c, model, x, t, cond, labelled, share)
        if self.omega == 1 and self.kappa == 0:
            return v_c
        v_g = (
            self.omega * v_c + (1 - self.omega - self.kappa) * model(x, t, t, unlabelled(cond))["u"]
        )
        if self.kappa:
            v_g = v_g + self.kappa * model(x, t, t, cond)["u"]
        return torch.where(like(labelled & inside(t, self.guidance_interval), x), v_g, v_c)
