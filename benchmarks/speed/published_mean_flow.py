"""MeanFlow's loss as its paper computes it, to be timed beside ours (`bench --published`).

Algorithm 1 of Geng et al., arXiv 2505.13447: value and tangent of every row in one call of
torch.func.jvp, whose graph is kept, through attention that has a forward-mode rule. The same draws
give the same loss and gradient as zoo/objectives/mean_flow.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from registry.protocols import Batch, LossOutput, Network
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import like, mean_flat, sum_flat
from zoo.points.draws import draw
from zoo.points.velocities import Conditional


@dataclass(frozen=True, kw_only=True)
class PublishedMeanFlow(MeanFlow):
    """MeanFlow that differentiates all rows together with their values."""

    @classmethod
    def of(cls, ours: MeanFlow) -> PublishedMeanFlow:
        """With the same parts."""
        if ours.guidance is not None:
            raise ValueError("the published algorithm has no mean_flow.guidance; leave it unbound")
        if not isinstance(ours.velocity, Conditional):
            raise ValueError(
                "the published algorithm takes the conditional velocity; leave mean_flow.velocity "
                "unbound"
            )
        return cls(**{f.name: getattr(ours, f.name) for f in fields(ours)})

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        v = self._guided(self.teacher(net), d, rng)

        def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return net(x, t, r, d.cond)["u"]

        with sdpa_kernel(SDPBackend.MATH):
            tangents = (v, torch.ones_like(d.t), torch.zeros_like(d.r))
            value, du_dt = torch.func.jvp(u, (d.x_t, d.t, d.r), tangents)[:2]
        squares = (value - (v - like(d.t - d.r, v) * du_dt).detach()) ** 2
        return LossOutput(
            per_sample=self.weight(sum_flat(squares), {"u": value}),
            terms={"u": mean_flat(squares).detach()},
            t=d.t,
            r=d.r,
        )
