"""Means over seeds with 95 % intervals, and differences paired by seed.

    mean +- t(0.975, n - 1) s / sqrt(n)        Student t over the n seeds, s with n - 1

Runs of one seed share data order, noise and initialisation, so the difference of two rows is taken
seed by seed. One seed has no interval. Intervals are not corrected for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of n values; `half` is half the width of its interval, None for a single value."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies above or below zero, else 0."""
        if self.half is None or not math.isfinite(self.mean):
            return 0
        return (self.mean - self.half > 0) - (self.mean + self.half < 0)


def interval(values: Sequence[float]) -> Interval:
    """The mean of the values and its interval; both are nan where one of the values is nan."""
    n = len(values)
    with np.errstate(invalid="ignore"):
        mean = float(np.mean(values))
        if n < 2:
            return Interval(mean, None, n)
        # Not t.interval(loc, scale): it gives nan where all values are equal.
        reach = stats.t.interval(LEVEL, n - 1)[1] * stats.sem(values)
    return Interval(mean, float(reach), n)


def paired(
    ours: Mapping[int, float], theirs: Mapping[int, float], *, ratio: bool = False
) -> Interval | None:
    """The mean difference of our values and theirs, or of their ratio, over the seeds of both.

    None where they have no seed in common.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    if ratio:
        return interval([ours[seed] / theirs[seed] for seed in seeds])
    return interval([ours[seed] - theirs[seed] for seed in seeds])
