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
    Weight,
)
from registry.ranges import Probability
from zoo.couplings import Independent, coupled_noise
from zoo.guidance import drop_labels
from zoo.ops import mean_flat, normal_like
from zoo.paths import Linear
from zoo.times import Uniform
from zoo.weighting import Unweighted


@objectives.register("flow_matching")
@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Velocity regression, sampled as an ODE; the baseline of every few-step method."""

    heads: ClassVar[tuple[str, ...]] = ("v",)
    trains: ClassVar[tuple[str, ...]] = ("velocity",)
    reference: ClassVar = Reference(
        title="Flow Matching for Generative Modeling",
        authors="Lipman et al.",
        year=2022,
        arxiv="2210.02747",
    )

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=Uniform)
    coupling: Coupling = field(default_factory=Independent)
    weight: Weight = field(default_factory=Unweighted)
    label_dropout: Probability = 0.1

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        x1 = coupled_noise(self.coupling, batch.x0, normal_like(batch.x0, rng), batch.cond)
        t, _ = self.times(len(batch), rng)
        cond, _ = drop_labels(batch.cond, self.label_dropout, rng, len(batch))
        x0, x1, t, cond = batch.share.rows(batch.x0, x1, t, cond)
        sample = self.path.sample(x0, x1, t)

        out = net(sample.x_t, t, t, cond)
        error = mean_flat((out["v"] - sample.velocity) ** 2)
        return LossOutput(per_sample=self.weight(error, out), terms={"v": error.detach()}, t=t, r=t)
