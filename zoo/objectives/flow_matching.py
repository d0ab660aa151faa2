"""Flow matching: regress the velocity of the path.

    loss = || v(x_t, t) - d x_t / dt ||^2

Its minimiser is the marginal velocity E[d x_t / dt | x_t], whose ODE carries noise to data.

From the papers: the loss, linear path, uniform times (Lipman et al., arXiv 2210.02747; Liu et al.,
2209.03003), logit-normal times (Esser et al., 2403.03206), minibatch OT (Tong et al., 2302.00482).
Our reading: the loss is a mean over elements; labels are dropped in 10 % of the rows, as later
works do; with labels, optimal transport pairs rows of the same label (zoo/couplings.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from registry import objectives
from registry.protocols import (
    Batch,
    Coupling,
    LossOutput,
    Network,
    Path,
    Reference,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.couplings import Independent
from zoo.ops import mean_flat, terms_of
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_velocity
from zoo.times import Uniform
from zoo.weighting import Unweighted


@objectives.register("flow_matching")
@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Velocity regression, sampled as an ODE; the baseline of every few-step method."""

    heads: ClassVar[tuple[str, ...]] = ("v",)
    trains: ClassVar[tuple[str, ...]] = ("velocity",)
    reference: ClassVar = Reference(
        "Flow Matching for Generative Modeling", "Lipman et al.", 2022, "2210.02747"
    )

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=Uniform)
    coupling: Coupling = field(default_factory=Independent)
    velocity: VelocityEstimator = field(default_factory=Conditional)
    weight: Weight = field(default_factory=Unweighted)
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_velocity("flow_matching", self.velocity, coupling=self.coupling, anchors=False)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout, coupling=self.coupling)
        v = self.velocity.target(d, net, rng)
        out = net(d.x_t, d.t, d.t, d.cond)
        error = mean_flat((out["v"] - v) ** 2)
        loss, terms = self.weight(error, out), terms_of(v=error)
        return LossOutput(per_sample=loss, terms=terms, t=d.t, r=d.t)
