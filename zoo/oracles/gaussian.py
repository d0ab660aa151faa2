"""Gaussian data N(mu, diag(s^2)): every quantity in closed form, per element.

    m_t = (1 - t) mu,   S_t^2 = (1 - t)^2 s^2 + t^2        mean and variance of x_t
    v*(x, t)    = -mu + c_t (x - m_t),   c_t = (t - (1 - t) s^2) / S_t^2
    X(x, t, r)  = m_r + (S_r / S_t) (x - m_t)
    u*(x, t, r) = -mu + k (x - m_t),     k = ((1 + s^2)(t + r) - 2 s^2) / (S_t (S_t + S_r))
    Var(x1 - x0 | x_t) = s^2 / S_t^2

Cov(x1 - x0, x_t) = t - (1 - t) s^2, hence v* by regression. c_t is the logarithmic derivative of
S_t, so the linear ODE integrates to the ratio of standard deviations. The average slope
(1 - S_r / S_t) / (t - r) is k, since S_t^2 - S_r^2 = (t - r)((1 + s^2)(t + r) - 2 s^2): no 0/0 at
r = t, where k = c_t. The flow-matching loss at the oracle, t uniform, is s pi / 2 per element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from registry.protocols import Cond
from zoo.ops import like, sum_flat
from zoo.oracles.exact import Oracle, parameter


class GaussianOracle(Oracle):
    """Diagonal Gaussian data, `mean` and `std` of a sample's shape; conditions are ignored."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: object, std: object) -> None:
        super().__init__()
        self.register_buffer("mean", parameter(mean))
        self.register_buffer("std", parameter(std))
        self.shape = tuple(self.mean.shape)
        if self.mean.ndim == 0 or self.mean.shape != self.std.shape or not (self.std > 0).all():
            raise ValueError(
                f"mean has shape {tuple(self.mean.shape)} and std {tuple(self.std.shape)}; both "
                "must have the shape of one sample, such as (2,), and every std must be positive"
            )

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        slope = self._velocity_slope(t)
        return (slope * self._centred(x, t) - self.mean).to(x.dtype)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None) -> Tensor:
        scale_t, scale_r = self._variance(t).sqrt(), self._variance(r).sqrt()
        total = (1 + self.std**2) * (self._time(t) + self._time(r)) - 2 * self.std**2
        slope = total / (scale_t * (scale_t + scale_r))
        return (slope * self._centred(x, t) - self.mean).to(x.dtype)

    def velocity_jacobian(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.diag_embed(self._velocity_slope(t).flatten(1)).to(x.dtype)

    def log_density(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        variance = self._variance(t)
        terms = self._centred(x, t) ** 2 / variance + (2 * math.pi * variance).log()
        return -0.5 * sum_flat(terms).to(x.dtype)

    def score(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return (-self._centred(x, t) / self._variance(t)).to(x.dtype)

    def posterior_variance(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        return (self.std**2 / self._variance(t)).to(x.dtype)

    def marginal_mean(self, t: Tensor, cond: Cond | None = None) -> Tensor:
        return (1 - self._time(t)) * self.mean

    def marginal_variance(self, t: Tensor, cond: Cond | None = None) -> Tensor:
        return self._variance(t)

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Cond | None]:
        noise = torch.randn(n, *self.shape, generator=rng, dtype=self.mean.dtype)
        return self.mean + self.std * noise, None

    def _time(self, t: Tensor) -> Tensor:
        return like(t.to(self.mean.dtype), self.mean.unsqueeze(0))

    def _variance(self, t: Tensor) -> Tensor:
        time = self._time(t)
        return (1 - time) ** 2 * self.std**2 + time**2  # S_t^2

    def _centred(self, x: Tensor, t: Tensor) -> Tensor:
        return x.to(self.mean.dtype) - self.marginal_mean(t)

    def _velocity_slope(self, t: Tensor) -> Tensor:
        time = self._time(t)
        return (time - (1 - time) * self.std**2) / self._variance(t)  # c_t
