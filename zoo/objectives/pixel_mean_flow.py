"""Pixel MeanFlow (pMF): improved MeanFlow of a network that predicts the clean picture.

    v rows   || v(x_t, t, r) - sg v_g ||^2                                    on every row
    V rows   || u(x_t, t, r) + (t - r) sg[du/dt] - sg v_g ||^2                on every row
    feature rows   || F(x_t - t u(x_t, t, r)) - F(x_0) ||^2     where t < 0.8, with features F

Both outputs of the network are predictions x of the data, by run.parametrisation = @data():

    u = (x_t - x) / max(t, t_min),      conditional velocity (x_t - x_0) / max(t, t_min)

with one t_min = 0.05, so that x is the data at every t, and no small t divides. Below t_min the
conditional velocity is too small, by the factor t / t_min, and so is the velocity that is learned:
it is biased there by design. With t_min = 0 the conditional velocity is x_1 - x_0 at every t, of
which the true map is the fixed point.

Everything else is improved MeanFlow (zoo/objectives/improved_mean_flow.py): the derivative along
the network's own velocity, the guidance as an input, the adaptive weight of each error.

From the paper (Lu et al., arXiv 2601.22158) and its released code: all of the above, r = t in half
of the rows, t and r sigmoid(N(0.8, 0.8^2)) for patches of 16 pixels. Its features are those of
LPIPS (weight 0.4) and of a ConvNeXt classifier (weight 0.1), on random crops. Its noise has the
standard deviation 1, 2, 1 and 4 for B/16, B/32, L/16 and L/32. Our reading: any registered features
(zoo/features.py), one term, without crops; data that are divided by the scale, by the data set
@scaled(), in the place of noise that is multiplied by it; dropped labels as in improved MeanFlow.
The paper's networks, with blocks of their own for each output, are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Derivative,
    Features,
    GuidanceLaw,
    LossOutput,
    Network,
    Path,
    Reference,
    TimeLaw,
    Weight,
)
from registry.ranges import NotNegative, Probability
from zoo.derivatives.one_pass import OnePass
from zoo.ops import like, mean_flat, sum_flat
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.identity import velocity_errors
from zoo.times import SplitsSteps, TwoLogitNormals, check_fraction
from zoo.weighting import Adaptive


def late_times() -> TwoLogitNormals:
    """The paper's law for patches of 16 pixels, with more noise than those of latents."""
    means = {"t_mean": 0.8, "r_mean": 0.8, "diagonal_mean": 0.8}
    stds = {"t_std": 0.8, "r_std": 0.8, "diagonal_std": 0.8}
    return TwoLogitNormals(**means, **stds, off_diagonal_fraction=0.5, pairing="sorted")


@objectives.register("pixel_mean_flow")
@dataclass(frozen=True, kw_only=True)
class PixelMeanFlow(SplitsSteps):
    """Improved MeanFlow in data prediction, with features of the predicted data."""

    heads: ClassVar[tuple[str, ...]] = ("u", "v")
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = Reference(
        title="One-step Latent-free Image Generation with Pixel Mean Flows",
        authors="Lu et al.",
        year=2026,
        arxiv="2601.22158",
    )
    exact_with: ClassVar = {"t_min": 0.0}  # the velocity is biased below t_min

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=late_times)
    derivative: Derivative = field(default_factory=OnePass)
    weight_u: Weight = field(default_factory=Adaptive)
    weight_v: Weight = field(default_factory=Adaptive)
    t_min: Probability = 0.05
    features: Features | None = None
    weight_features: Weight = field(default_factory=Adaptive)
    features_scale: NotNegative = 0.4
    features_below: Probability = 0.8
    guidance: GuidanceLaw | None = None
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_fraction("pixel_mean_flow.t_min", self.t_min)
        check_fraction("pixel_mean_flow.features_below", self.features_below)
        if self.features_scale < 0:
            raise ValueError(
                f"pixel_mean_flow.features_scale = {self.features_scale!r} must be at least 0"
            )

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout, guidance=self.guidance)
        bounded = d.t / d.t.clamp(min=self.t_min) if self.t_min else torch.ones_like(d.t)
        d = replace(d, velocity=like(bounded, d.x_t) * d.velocity)

        quota = self.times.num_off_diagonal(len(batch))
        k, derivative = batch.share.size(quota), self.derivative if quota else None
        errors = velocity_errors(derivative, net, d, k, guided=self.guidance is not None)
        loss = errors.loss(self.weight_u, self.weight_v)
        if self.features is None:
            return loss
        near = d.t < self.features_below
        x0 = self.path.to_x0(d.x_t, errors.out["u"], d.t)
        squares = self._squares(self.features, x0, d.x0)
        weighted = self.weight_features(torch.where(near, sum_flat(squares), 0), errors.out)
        return replace(
            loss,
            per_sample=loss.per_sample + self.features_scale * weighted,
            terms={**loss.terms, "features": mean_flat(squares).detach()},  # of every row
        )

    @staticmethod
    def _squares(features: Features, x0: Tensor, truth: Tensor) -> Tensor:
        """The squared differences [b k] of the features of predicted and true data."""
        with torch.no_grad():
            wanted = features(truth)
        return (features(x0) - wanted) ** 2
