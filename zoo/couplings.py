"""Couplings decide which noise is paired with which data of a batch, before interpolation.

`minibatch_ot` pairs by the exact optimal-transport plan of the batch (squared Euclidean cost; for
uniform marginals the plan is a permutation). It changes the marginal velocity, so the closed forms
for independent coupling do not apply. Tong et al., arXiv 2302.00482; Pooladian et al., 2304.14772.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from registry import couplings
from registry.protocols import Reference


@couplings.register("independent")
@dataclass(frozen=True, kw_only=True)
class Independent:
    """The noise in the order in which it was drawn."""

    def __call__(self, x0: Tensor, x1: Tensor) -> Tensor:
        return x1


@couplings.register("minibatch_ot")
@dataclass(frozen=True, kw_only=True)
class MinibatchOT:
    """The noise in the order of least total squared distance from the data of the batch."""

    couples_rows: ClassVar = True
    reference: ClassVar = Reference(
        title="Improving and Generalizing Flow-Based Generative Models with Minibatch OT",
        authors="Tong et al.",
        year=2023,
        arxiv="2302.00482",
    )

    def __call__(self, x0: Tensor, x1: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment  # slow to import, and seldom used

        cost = torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()) ** 2
        _, pairing = linear_sum_assignment(cost.cpu().numpy())
        return x1[torch.as_tensor(pairing, device=x1.device)]
