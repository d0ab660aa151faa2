"""A toy that trains through features: one step from noise, compared with data row by row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from registry.protocols import Batch, Features, LossOutput, Network
from zoo.features import RandomConvolutions
from zoo.ops import like, mean_flat, normal_like


@dataclass(frozen=True, kw_only=True)
class Matching:
    """|| f(x1 - u(x1, 1, 0)) - f(x0) ||^2, the gradient by the features of the sample."""

    heads: ClassVar = ("u",)

    features: Features = field(default_factory=lambda: RandomConvolutions(channels=1, widths=(8,)))

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        x1, t = normal_like(batch.x0, rng), torch.ones(len(batch), device=rng.device)
        x0, x1, t, cond = batch.share.rows(batch.x0, x1, t, batch.cond)
        x = x1 - like(t, x1) * net(x1, t, 0 * t, cond)["u"]
        error = mean_flat((self.features(x) - self.features(x0)) ** 2)
        return LossOutput(per_sample=error, terms={"features": error.detach()}, t=t, r=0 * t)
