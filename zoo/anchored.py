"""The losses of FACM, which DE-CM takes over: a consistency loss and the flow that anchors it.

Both are read from FACM's released code (Peng et al., arXiv 2507.03738).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from zoo.ops import like, mean_flat


def relaxed_consistency(u: Tensor, g: Tensor, t: Tensor, clip: float) -> Tensor:
    """beta e / sg(e + 1e-3)^(1/2) [b] of the map to r = 0, with the residual g [b *d].

    e is the mean squared distance of u to a step of a = 1 - sqrt(1 - t) along -g, which is limited
    to +-clip by element, and beta = sin(pi t / 2).
    """
    step = like(1 - (1 - t).sqrt(), u) * g.clamp(-clip, clip)
    error = mean_flat((u - (u - step).detach()) ** 2)
    return torch.sin(math.pi / 2 * t) * error / (error.detach() + 1e-3).sqrt()


def anchor(u: Tensor, v: Tensor, cosine_weight: float) -> Tensor:
    """The mean squared error [b] plus `cosine_weight` times the mean of 1 - cos(u, v).

    Each cosine is over the channels (axis 1) of one position.
    """
    cosine = cosine_similarity(u, v, dim=1).reshape(len(u), -1).mean(1)
    return mean_flat((u - v) ** 2) + cosine_weight * (1 - cosine)
