"""Averages of the weights whose width is chosen after training.

An average of relative width w at step T gives the weights of step s <= T the density

    p(s) = (k + 1) s^k / T^(k + 1),    w = std(p) / T = sqrt((k + 1) / ((k + 2)^2 (k + 3)))

It looks back over a share of the run, whatever its length, and forgets the initial weights. Taking
a step's weights to hold since the step before, it is kept exactly by

    average <- (1 - 1/T)^(k + 1) average + (1 - (1 - 1/T)^(k + 1)) net,    T = 1, 2, ...

Snapshots of such averages have densities p_i. A combination of them has the combination of these
as its density, so the average of any width at any step is theirs with the coefficients x that
minimise the integral of (sum_i x_i p_i - p)^2, sum_i x_i = 1: a linear system of integrals of
products of powers. Exact is the system; approximate is the density, and `Mixture.error` says by how
much.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv
2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WIDEST = 12**-0.5  # the uniform average, k = 0


@lru_cache
def exponent(width: float) -> float:
    """k of a relative width; ValueError unless the width lies between 0 and that of k = 0."""
    if not 0 < width < WIDEST:
        raise ValueError(
            f"the relative width {width!r} of an average must lie above 0 and below "
            f"{WIDEST:.4f}, where all steps weigh the same; the usual ones are 0.05 and 0.1"
        )
    s = width**-2  # k^3 + 7 k^2 + (16 - s) k + 12 - s = 0 has one positive root
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


@dataclass(frozen=True)
class Profile:
    """The density of an average of relative width `width` after `step` updates."""

    step: int
    width: float

    def __post_init__(self) -> None:
        exponent(self.width)
        if self.step < 1:
            raise ValueError(f"there is no average at step {self.step}; steps count from 1")

    def overlap(self, other: Profile) -> float:
        """The integral of the product of both densities."""
        early, late = sorted((self, other), key=lambda profile: profile.step)
        k, m = exponent(early.width), exponent(late.width)
        scale = (k + 1) * (m + 1) / (k + m + 1)
        return scale * (early.step / late.step) ** m / late.step


@dataclass(frozen=True)
class Mixture:
    """Coefficients of given averages, of sum 1, that make another one.

    `error` is the norm of what the density lacks, relative to that of the density wanted.
    """

    coefficients: tuple[float, ...]
    error: float


def mixture(given: Sequence[Profile], wanted: Profile) -> Mixture:
    """The combination of the given averages that comes closest to the wanted one."""
    if wanted in given:
        return Mixture(tuple(float(profile == wanted) for profile in given), 0.0)
    norm = wanted.overlap(wanted)
    products = np.array([[a.overlap(b) for b in given] for a in given]) / norm
    target = np.array([a.overlap(wanted) for a in given]) / norm
    # The last unknown is the multiplier of the condition on the sum. By least squares, since
    # averages of almost the same width and step make the system almost singular.
    n = len(given)
    system = np.ones((n + 1, n + 1))
    system[:n, :n], system[n, n] = products, 0.0
    x = np.linalg.lstsq(system, np.append(target, 1.0), rcond=None)[0][:n]
    squared = 1.0 - 2.0 * x @ target + x @ products @ x
    return Mixture(tuple(x.tolist()), float(max(squared, 0.0)) ** 0.5)
