"""Improved MeanFlow (iMF): the MeanFlow identity as a regression of the velocity.

    v rows   || v(x_t, t, r) - sg v_g ||^2                                    on every row
    V rows   || u(x_t, t, r) + (t - r) sg[du/dt] - sg v_g ||^2                on every row

du/dt is the derivative of u along (v(x_t, t, t), 1, 0): the network's own velocity, which is a
function of x_t, t and the label, takes the place of MeanFlow's conditional velocity in the tangent.
The left side is then a function of x_t as well, and the loss is an ordinary regression whose mean
is the variance of the conditional velocity at the optimum. Where r = t, V is u itself.

With a guidance law (zoo/guidance.py) each row draws a scale w and an interval of times, which are
inputs of the network, and inside the interval

    v_g = v_c + (1 - 1/w) ( v(x_t, t, t, y, w) - v(x_t, t, t, null, 1) )

whose fixed point is classifier-free guidance of scale w.

From the paper (Geng et al., arXiv 2512.02012) and its released code: all of the above, r = t in
half of the rows, logit-normal times, both errors summed over the elements with the adaptive weight,
10 % dropped labels with unguided targets. Our reading: dropped labels fall on any row (the code
drops them on the first rows), and the tangent of such a row is its own, unconditional velocity,
where the code keeps the conditional one. On the same draws, in float64, loss and gradient differ
from the code's by 7e-16 (48 cases; in those with dropped labels the code was given our tangent).

The paper's networks give each output eight blocks of its own, which the head `deep_dual` makes,
feed t - r alone and put all conditions into tokens; any network with the outputs u and v is taken
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from registry import objectives
from registry.protocols import (
    Batch,
    Derivative,
    GuidanceLaw,
    LossOutput,
    Network,
    Path,
    TimeLaw,
    Weight,
)
from registry.ranges import Probability
from zoo.derivatives.one_pass import OnePass
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.identity import velocity_errors
from zoo.times import LogitNormalPair, SplitsSteps
from zoo.times.sources import IMPROVED_MEAN_FLOW
from zoo.weighting import Adaptive


@objectives.register("improved_mean_flow")
@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlow(SplitsSteps):
    """Velocity regression through the MeanFlow identity, with a velocity head for its tangent."""

    heads: ClassVar[tuple[str, ...]] = ("u", "v")
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = IMPROVED_MEAN_FLOW

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=lambda: LogitNormalPair(off_diagonal_fraction=0.5))
    derivative: Derivative = field(default_factory=OnePass)
    weight_u: Weight = field(default_factory=Adaptive)
    weight_v: Weight = field(default_factory=Adaptive)
    guidance: GuidanceLaw | None = None
    label_dropout: Probability = 0.1

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout, guidance=self.guidance)
        quota = self.times.num_off_diagonal(len(batch))
        k, derivative = batch.share.size(quota), self.derivative if quota else None
        errors = velocity_errors(derivative, net, d, k, guided=self.guidance is not None)
        return errors.loss(self.weight_u, self.weight_v)
