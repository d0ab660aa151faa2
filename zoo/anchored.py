"""The losses of FACM, which DE-CM takes over: a consistency loss and the flow that anchors it.

Both are read from FACM's released code (Peng et al., arXiv 2507.03738).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from registry.protocols import Cond, Derivative, Network
from zoo.derivatives.one_pass import outputs_and_derivative
from zoo.ops import like, mean_flat


def map_to_data(
    derivative: Derivative, net: Network, x: Tensor, t: Tensor, cond: Cond | None, v: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The outputs at (x, t, 0), and the residual g = u - v + t du/dt of the map to the data.

    The derivative is along the velocity v, with the tangents (v, 1, 0) for (x, t, r).
    """
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    out, du = outputs_and_derivative(derivative, net, cond, (x, t, zero), (v, one, zero))
    return out, out["u"].detach() - v + like(t, x) * du


def relaxed_error(u: Tensor, g: Tensor, t: Tensor, clip: float, power: float = 0.5) -> Tensor:
    """e [b], the mean squared distance of u to a step of a = 1 - (1 - t)^power along -g.

    The residual g [b *d] is limited to +-clip by element.
    """
    step = like(1 - (1 - t) ** power, u) * g.clamp(-clip, clip)
    return mean_flat((u - (u - step).detach()) ** 2)


def towards_noise(t: Tensor) -> Tensor:
    """beta = sin(pi t / 2) [b], the weight of the consistency loss: 0 at the data, 1 at noise."""
    return torch.sin(math.pi / 2 * t)


def relaxed_consistency(u: Tensor, g: Tensor, t: Tensor, clip: float) -> Tensor:
    """beta e / sg(e + 1e-3)^(1/2) [b] of the map to r = 0, with the residual g [b *d]."""
    error = relaxed_error(u, g, t, clip)
    return towards_noise(t) * error / (error.detach() + 1e-3).sqrt()


def anchor(u: Tensor, v: Tensor, cosine_weight: float) -> Tensor:
    """The mean squared error [b] plus `cosine_weight` times the mean of 1 - cos(u, v).

    Each cosine is over the channels (axis 1) of one position.
    """
    cosine = cosine_similarity(u, v, dim=1).reshape(len(u), -1).mean(1)
    return mean_flat((u - v) ** 2) + cosine_weight * (1 - cosine)
