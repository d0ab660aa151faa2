"""The readout of DiT's network is the noise of its process; here velocities are made of it.

    x_k = alpha_k x0 + sigma_k noise,   sigma_k / alpha_k = t / (1 - t) fixes the step k of a time t
    u = noise - x0 = noise - (x_k - sigma_k noise) / alpha_k

Peebles and Xie, arXiv 2212.09748: 1000 steps, betas from 0.0001 to 0.02.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.network import FlowNetwork
from backbones.parametrisations.equations import per_row
from registry import parametrisations
from registry.protocols import Call, Reference


@parametrisations.register("vp_noise")
@dataclass(frozen=True, kw_only=True)
class VpNoise:
    """The readout is the noise of DiT's process, and the trunk sees x and the steps of it.

    Time t becomes the step k with the same ratio of noise to data, t / (1 - t), over 1000, which
    DiT's embedding multiplies by 1000; x is scaled to that process. Times before its first step (t
    = 0.0099) take the first, and times after its last step (t = 0.9937) take the last. So do times
    r, our reading: the paper has v alone.
    """

    on_path: ClassVar = "linear"
    reference: ClassVar = Reference(
        title="Scalable Diffusion Models with Transformers",
        authors="Peebles and Xie",
        year=2022,
        arxiv="2212.09748",
    )

    def inputs(self, at: Call) -> Call:
        t, r = (vp_step(time)[0] / 1000 for time in (at.t, at.r))
        return Call(_scaled(at), t, r, at.cond)

    def __call__(self, raw: Tensor, key: str, at: Call) -> Tensor:
        _, alpha, sigma = vp_step(at.t)
        x0 = (_scaled(at) - per_row(sigma, raw) * raw) / per_row(alpha, raw)
        return raw - x0


class NoiseNetwork(FlowNetwork):
    """The name, in 0.1, of a network whose parametrisation is `vp_noise`."""

    def __init__(self, trunk: nn.Module, heads: Sequence[Any]):
        super().__init__(trunk, heads, VpNoise())


def _scaled(at: Call) -> Tensor:
    return at.x / per_row(((1 - at.t) ** 2 + at.t**2).sqrt(), at.x)


def vp_step(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(k, alpha, sigma) [b] of DiT's process at the noise-to-data ratio of t; k may be fractional.

    Betas rise linearly from 0.0001 to 0.02 in 1000 steps; log-ratios are linear between steps.
    """
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device=t.device)
    kept = (1 - betas).cumprod(0)
    table = 0.5 * ((1 - kept) / kept).log()
    wanted = torch.logit(t.double().clamp(1e-6, 1 - 1e-6)).clamp(table[0], table[-1])
    above = torch.searchsorted(table, wanted).clamp(1, 999)
    low, high = table[above - 1], table[above]
    step = above - 1 + (wanted - low) / (high - low)
    ratio = wanted.exp()
    alpha = 1 / (1 + ratio**2).sqrt()
    return step.to(t.dtype), alpha.to(t.dtype), (ratio * alpha).to(t.dtype)
