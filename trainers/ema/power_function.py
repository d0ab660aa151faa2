"""Averages of the weights whose width is chosen after training.

At step T an average weighs the weights of step s <= T by the density

    p(s) = (k + 1) s^k / T^(k + 1),    sigma_rel = std(p) / T = sqrt((k + 1) / ((k + 2)^2 (k + 3)))

`sigma_rel` is its relative width. Such an average looks back over the same share of the run at any
time, and the initial weights have no part in it. If the weights after a step count for the whole
time since the step before, this update keeps the average exactly:

    average <- (1 - 1/T)^(k + 1) average + (1 - (1 - 1/T)^(k + 1)) net,    T = 1, 2, ...

Snapshots of such averages have densities p_i, and a linear combination of the snapshots has the
same combination of the p_i as its density. To make the average of any width at any step, we take
the coefficients x, with sum_i x_i = 1, that minimise the integral of (sum_i x_i p_i - p)^2. They
solve a linear system whose entries are integrals of products of powers. The system is exact. The
density that comes out is an approximation, and `ProfileMixture.error` says how good it is.

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
def exponent(sigma_rel: float) -> float:
    """The exponent k of a relative width; ValueError unless it lies between 0 and WIDEST."""
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(
            f"sigma_rel = {sigma_rel!r}: the relative width of an average must lie above 0 and "
            f"below {WIDEST:.4f}, at which all steps weigh the same; usual ones are 0.05 and 0.1"
        )
    s = sigma_rel**-2  # k^3 + 7 k^2 + (16 - s) k + 12 - s = 0 has one positive root
    return float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max())


@dataclass(frozen=True)
class Profile:
    """The density of an average of relative width `sigma_rel` after `step` updates."""

    step: int
    sigma_rel: float

    def __post_init__(self) -> None:
        exponent(self.sigma_rel)
        if self.step < 1:
            raise ValueError(f"there is no average at step {self.step}; steps count from 1")

    def overlap(self, other: Profile) -> float:
        """The integral of the product of both densities."""
        early, late = sorted((self, other), key=lambda profile: profile.step)
        k, m = exponent(early.sigma_rel), exponent(late.sigma_rel)
        scale = (k + 1) * (m + 1) / (k + m + 1)
        return scale * (early.step / late.step) ** m / late.step


@dataclass(frozen=True)
class ProfileMixture:
    """Coefficients, of sum 1, with which given averages are combined to another one.

    `error` is the norm of the difference between its density and the wanted one, relative to the
    norm of the wanted one.
    """

    coefficients: tuple[float, ...]
    error: float


def mixture(given: Sequence[Profile], wanted: Profile) -> ProfileMixture:
    """The combination of the given averages whose density comes closest to the wanted one."""
    if wanted in given:
        return ProfileMixture(tuple(float(profile == wanted) for profile in given), 0.0)
    norm = wanted.overlap(wanted)
    products = np.array([[a.overlap(b) for b in given] for a in given]) / norm
    target = np.array([a.overlap(wanted) for a in given]) / norm
    # The last unknown is the multiplier of the condition on the sum. The system is solved by least
    # squares because averages of almost the same width and step make it almost singular.
    n = len(given)
    system = np.ones((n + 1, n + 1))
    system[:n, :n], system[n, n] = products, 0.0
    x = np.linalg.lstsq(system, np.append(target, 1.0), rcond=None)[0][:n]
    squared = 1.0 - 2.0 * x @ target + x @ products @ x
    return ProfileMixture(tuple(x.tolist()), float(max(squared, 0.0)) ** 0.5)
