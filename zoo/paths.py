"""Paths from data (t=0) to noise (t=1): x_t = alpha(t) x0 + sigma(t) x1.

    velocity = d_alpha(t) x0 + d_sigma(t) x1

These are two linear equations in x0 and x1, so every conversion solves one 2x2 system. `linear` is
the path of flow matching (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).
`trigflow` is the variance-preserving circle of Lu & Song, arXiv 2410.11081, with the angle
phi = pi t / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from registry import paths
from registry.protocols import Path, PathSample, Reference
from zoo.ops import like


def path_of(objective: Any) -> Path:
    """The path that the objective trains on; the linear one where it has no field `path`."""
    path: Path | None = getattr(objective, "path", None)
    return Linear() if path is None else path


def time_at(path: Path, ratio: Tensor, near: Tensor) -> Tensor:
    """The time [b] at which sigma / alpha is `ratio` [b], from a time `near` it.

    By Newton's method for sigma(t) = ratio alpha(t). One step is exact on the linear path, and four
    are to rounding on the trigonometric one.
    """
    t = near
    for _ in range(4):
        slope = path.d_sigma(t) - ratio * path.d_alpha(t)
        t = t - (path.sigma(t) - ratio * path.alpha(t)) / slope
    return t


class AffinePath:
    """Sampling and conversions for any alpha(t), sigma(t)."""

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> PathSample:
        """x0, x1 [b *d], t [b] in [0, 1] -> the point x_t and the conditional velocity."""
        x_t = like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * x1
        return PathSample(x_t, self.to_velocity(x0, x1, t))

    def to_velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x0, x1 [b *d], t [b] -> the conditional velocity at t, [b *d]."""
        return like(self.d_alpha(t), x0) * x0 + like(self.d_sigma(t), x0) * x1

    def to_x0(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The data end of the conditional path through x_t with this velocity."""
        x0 = like(self.d_sigma(t), x_t) * x_t - like(self.sigma(t), x_t) * velocity
        return x0 / like(self._determinant(t), x_t)

    def to_x1(self, x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
        """The noise end of the conditional path through x_t with this velocity."""
        x1 = like(self.alpha(t), x_t) * velocity - like(self.d_alpha(t), x_t) * x_t
        return x1 / like(self._determinant(t), x_t)

    def _determinant(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.d_sigma(t) - self.sigma(t) * self.d_alpha(t)


@paths.register("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(AffinePath):
    """x_t = (1 - t) x0 + t x1, with velocity x1 - x0."""

    reference: ClassVar = Reference(
        title="Flow Matching for Generative Modeling",
        authors="Lipman et al.",
        year=2022,
        arxiv="2210.02747",
    )

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@paths.register("trigflow")
@dataclass(frozen=True, kw_only=True)
class TrigFlow(AffinePath):
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) x1."""

    reference: ClassVar = Reference(
        title="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        authors="Lu and Song",
        year=2024,
        arxiv="2410.11081",
    )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # this form of the cosine is exactly 0 at t=1

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.cos(math.pi / 2 * (1 - t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)


@dataclass(frozen=True)
class Angle:
    """The angle phi of points on sCM's circle, as cos(phi), sin(phi) and dphi/dt, each [b]."""

    cos: Tensor
    sin: Tensor
    d_dt: Tensor


def angle_on(path: Path, t: Tensor, sigma_data: float) -> Angle:
    """The angle of x_t on the circle cos(phi) x0 + sin(phi) sigma_data x1, a multiple of x_t."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    n = ((sigma_data * alpha) ** 2 + sigma**2).sqrt()
    determinant = alpha * path.d_sigma(t) - sigma * path.d_alpha(t)
    return Angle(sigma_data * alpha / n, sigma / n, sigma_data * determinant / n**2)
