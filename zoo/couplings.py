"""Couplings decide which noise is paired with which data of a batch, before interpolation.

`minibatch_ot` pairs by the exact optimal-transport plan of the batch (squared Euclidean cost; for
uniform marginals the plan is a permutation). It changes the marginal velocity, so the closed forms
for independent coupling do not apply. Tong et al., arXiv 2302.00482; Pooladian et al., 2304.14772.

The papers have no labels. With labels, a plan of the whole batch gives each label noise of its own,
while samples of every label start from all of the noise, and they land wrong. So rows are paired
among those of the same label only, and the noise stays independent of the label. That is ours. A
label that has one row in the batch keeps the noise in the order in which it was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from registry import couplings
from registry.protocols import Cond, Coupling, Reference


def coupled_noise(coupling: Coupling, x0: Tensor, x1: Tensor, cond: Cond | None) -> Tensor:
    """The rows of x1 [b *d] as the coupling pairs them with x0 [b *d].

    A coupling that looks at other rows sees those with the same conditions alone.
    """
    if not (getattr(coupling, "couples_rows", False) and cond):
        return coupling(x0, x1)
    conditions = torch.cat([value.reshape(len(x0), -1).double() for value in cond.values()], dim=1)
    _, group = torch.unique(conditions, dim=0, return_inverse=True)
    paired = x1.clone()
    for rows in (group == i for i in range(int(group.max()) + 1)):
        paired[rows] = coupling(x0[rows], x1[rows])
    return paired


@couplings.register("independent")
@dataclass(frozen=True, kw_only=True)
class Independent:
    """The noise in the order in which it was drawn."""

    def __call__(self, x0: Tensor, x1: Tensor) -> Tensor:
        return x1


@couplings.register("minibatch_ot")
@dataclass(frozen=True, kw_only=True)
class MinibatchOT:
    """The noise in the order of least total squared distance from the data of the same label."""

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
