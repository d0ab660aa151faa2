"""The second, smaller time of a consistency step, and the noise levels in which papers write both.

    sigma = t / (1 - t),   t = sigma / (1 + sigma)

is the noise level of x_t / (1 - t) = x0 + sigma x1 on the linear path. So log sigma = logit t: a
normal law of log sigma, as in EDM, iCT, ECT and sCM, is a logit-normal law of t with the same mean
and standard deviation.

`sigmoid_second` is the rule of ECT (Geng et al., arXiv 2406.14548), `karras_interval` the grid of
iCT (Song and Dhariwal, arXiv 2310.14189), which is that of EDM.
"""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = 1e-5  # how far times are kept from both ends, where sigma is 0 and infinite


def off_the_ends(t: Tensor) -> Tensor:
    """t [b], at least EDGE and at most 1 - EDGE."""
    return t.clamp(EDGE, 1 - EDGE)


def noise_level(t: Tensor) -> Tensor:
    """sigma [b] of the times t [b]."""
    return t / (1 - t)


def time_of(sigma: Tensor) -> Tensor:
    """t [b] of the noise levels sigma [b]."""
    return sigma / (1 + sigma)


def sigmoid_second(sigma: Tensor, share: float, k: float, b: float) -> Tensor:
    """sigma (1 - share (1 + k sigmoid(-b sigma))) [b], or 0 where that is negative.

    The step is the share of sigma for large noise, and up to (1 + k / 2) times as long for small.
    """
    longer = 1 + k * torch.sigmoid(-b * sigma)
    return sigma * (1 - share * longer).clamp_min(0)


def karras_interval(
    sigma: Tensor, num: int, low: float, high: float, rho: float
) -> tuple[Tensor, Tensor]:
    """The upper and lower end [b] of the interval that sigma [b] lies in.

    There are `num` intervals from low to high, of equal length in sigma^(1 / rho). Noise levels
    outside count for the nearest one. The lowest interval ends at 0 in place of low.
    """
    first, last = low ** (1 / rho), high ** (1 / rho)
    place = (sigma ** (1 / rho) - first) / (last - first) * num
    number = place.floor().clamp(0, num - 1)

    def edge(i: Tensor) -> Tensor:
        return (first + i / num * (last - first)) ** rho

    return edge(number + 1), torch.where(number > 0, edge(number), 0)
