"""A network that predicts the noise of DiT's process, used as a network that predicts velocities.

    x_k = alpha_k x0 + sigma_k noise,   sigma_k / alpha_k = t / (1 - t) fixes the step k of a time t
    v = noise - x0 = noise - (x_k - sigma_k noise) / alpha_k

Peebles and Xie, arXiv 2212.09748: 1000 steps, betas from 0.0001 to 0.02.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.network import FlowNetwork
from registry.protocols import Cond


class NoiseNetwork(FlowNetwork):
    """A network of trunk and heads that predicts noise; its outputs are velocities in our times.

    Time t becomes the step k with the same ratio of noise to data, t / (1 - t), and x is scaled to
    that process. Times before its first step (t = 0.0099) take the first, and times after its last
    step (t = 0.9937) take the last.
    """

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        step, alpha, sigma = vp_step(t)
        wide = (slice(None), *[None] * (x.ndim - 1))
        scaled = x / ((1 - t) ** 2 + t**2).sqrt()[wide]
        time = step / 1000  # the embedding multiplies it by 1000
        out = super().forward(scaled, time, time, cond)
        return {
            key: noise - (scaled - sigma[wide] * noise) / alpha[wide] for key, noise in out.items()
        }


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
