"""Drifting: a generator of one step whose samples drift towards the data and away from each other.

    f = x1 - u(x1, 1, 0),   || f / S - sg[ f / S + sum over radii of V / rms(V) ] ||^2

V moves a sample f_i, one of N of its group, by the data y_j and the other samples f_k of the group:

    V_i = ( sum_j A_ij y_j  sum_k B_ik  -  sum_k B_ik f_k  sum_j A_ij ) / S

A_ij and B_ik are affinities, at logits -distance / (mean distance * radius) that are -inf for a
sample and itself: the root of the softmax over all y_j and f_k times the softmax over the samples
f_i. Where samples and data have one law, y and f can be exchanged, and the mean of V is zero. S is
the mean distance over the root of the number of features, and rms(V) that of the group. Every
normalised field has size 1, so the loss says nothing of progress; the term `drift` does, V^2.

From the paper (Deng et al., arXiv 2602.04770) and its released code: all of the above with radii
0.02, 0.05, 0.2, and N = 64 samples and as many rows of data in each of 64 classes. On ImageNet
`features` are those of a network that was trained before, each scale and place with a loss of its
own; here they are one vector, by default the values themselves. The code also limits affinities to
`least_affinity = 0.001` from below, also that of a sample and itself. With and without this limit
losses and gradients agree with the code's to 4e-6 on 12 forced draws of one group; its distances
are differences of products.

Our reading: S and rms(V) are means over the group, where the paper's are means over the batch: a
share of the batch has the same losses alone. The paper's guidance is not here; it adds data of all
classes to the samples f_k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import Batch, Features, LossOutput, Network, Reference
from registry.ranges import Count, NotNegative
from zoo.features import RawValues
from zoo.ops import mean_flat
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.groups import in_groups

LEAST_SCALE, LEAST_DRIFT = 1e-3, 1e-4  # as in the released code


@objectives.register("drifting")
@dataclass(frozen=True, kw_only=True)
class Drifting:
    """A one-step generator, by a field of attraction to data and repulsion among samples."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("law",)
    fixed_point: ClassVar = "distribution"
    reference: ClassVar = Reference(
        title="Generative Modeling via Drifting",
        authors="Deng et al.",
        year=2026,
        arxiv="2602.04770",
    )

    features: Features = field(default_factory=RawValues)
    group: Count = 64
    radii: tuple[float, ...] = (0.02, 0.05, 0.2)
    over_samples: bool = True
    least_affinity: NotNegative = 0.0

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(
                f"drifting.group = {self.group!r} leaves a sample no other to be repelled by; it "
                "must be 2 or more"
            )
        if not self.radii or min(self.radii) <= 0:
            raise ValueError(
                f"drifting.radii = {self.radii!r} must be one or more positive numbers, such as "
                "(0.02, 0.05, 0.2)"
            )

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, Linear(), _from_noise, 0.0)
        f = d.x1 - net(d.x1, d.t, d.r, d.cond)["u"]
        made = in_groups(self.features(f).to(f.dtype), self.group)
        with torch.no_grad():
            data = in_groups(self.features(d.x0).to(f.dtype), self.group)
            scale, fields = self.drift(made, data)
            squares = fields.square()  # [radii g n k]
            size = squares.mean((2, 3), keepdim=True).sqrt().clamp_min(LEAST_DRIFT)
            target = made / scale + (fields / size).sum(0)
        error = mean_flat((made / scale - target).flatten(0, 1) ** 2)
        raw = squares.mean((0, 3)).flatten()
        return LossOutput(per_sample=error, terms={"drift": raw}, t=d.t, r=d.r)

    def drift(self, made: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """Samples and data [g n k] -> their scale S [g 1 1], and V [radii g n k]."""
        n, others = made.shape[1], torch.cat([made, data], dim=1)
        distance = torch.cdist(made, others)  # [g n 2n]
        mean = distance.mean((1, 2), keepdim=True)
        itself = torch.eye(n, 2 * n, dtype=torch.bool, device=made.device)
        logits = -(distance / mean.clamp_min(LEAST_SCALE)).masked_fill(itself, torch.inf)
        scale = (mean / made.shape[2] ** 0.5).clamp_min(LEAST_SCALE)
        fields = []
        for radius in self.radii:
            log_near = (logits / radius).log_softmax(2)
            if self.over_samples:
                log_near = (log_near + (logits / radius).log_softmax(1)) / 2
            near = log_near.exp().clamp_min(self.least_affinity)
            to_made, to_data = near.split(n, dim=2)
            pull = (to_data * to_made.sum(2, keepdim=True)) @ data
            push = (to_made * to_data.sum(2, keepdim=True)) @ made
            fields.append((pull - push) / scale)
        return scale, torch.stack(fields)


def _from_noise(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """t = 1 and r = 0 in every row."""
    return torch.ones(n, device=rng.device), torch.zeros(n, device=rng.device)
