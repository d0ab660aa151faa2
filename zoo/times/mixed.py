"""Laws that change over the run, and laws of several kinds of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import time_laws
from registry.protocols import TimeLaw
from registry.ranges import Count
from zoo.times.draws import (
    MANY,
    law_at,
    quota,
)
from zoo.times.pairs import BetaPair, LogitNormalPair
from zoo.times.sources import EXPLICIT_SHORTCUT, TWINFLOW


@time_laws.register("progressive")
@dataclass(frozen=True, kw_only=True)
class Progressive:
    """Another law, with r = 0 in a share of its rows with r < t that falls from all to none."""

    reference: ClassVar = EXPLICIT_SHORTCUT

    times: TimeLaw = field(default_factory=LogitNormalPair)
    steps: Count = 10_000

    def __post_init__(self) -> None:
        name = time_laws.name_of(self.times)
        if not self.times.num_off_diagonal(MANY):
            raise ValueError(
                f"progressive.times = @{name}() has no row with r < t whose r could be 0; choose "
                "a law of pairs, such as @logit_normal_pair()"
            )
        if getattr(self.times, "only_to_data", False):
            raise ValueError(
                f"progressive.times = @{name}() has r = 0 in every row with r < t already; choose "
                "a law that draws r, such as @logit_normal_pair()"
            )

    def at_step(self, step: int) -> TimeLaw:
        return _PartlyToData(times=law_at(self.times, step), share=self.share(step))

    def share(self, step: int) -> float:
        """The share of the rows with r < t that have r = 0."""
        return math.acos(min(step / self.steps, 1.0)) / math.acos(0.0)

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.times(n, rng)

    def num_off_diagonal(self, n: int) -> int:
        return self.times.num_off_diagonal(n)


@time_laws.register("quarters")
@dataclass(frozen=True, kw_only=True)
class Quarters:
    """Quarters of the rows: (t, r) = (1, 0), short steps, any steps of another law, and r = t."""

    reference: ClassVar = TWINFLOW

    times: TimeLaw = field(default_factory=lambda: BetaPair(off_diagonal_fraction=1.0))
    shortening: float = 0.05  # of the short steps: t - r of the other law, times this

    def __post_init__(self) -> None:
        if not 0 < self.shortening <= 1:
            raise ValueError(f"quarters.shortening = {self.shortening!r} must lie in (0, 1]")
        name = time_laws.name_of(self.times)
        if self.times.num_off_diagonal(MANY) < MANY or getattr(self.times, "only_to_data", False):
            raise ValueError(
                f"quarters.times = @{name}() must draw r < t in every row, and r > 0. Bind a law "
                f"such as @beta_pair() with off_diagonal_fraction = 1.0 and r_law = 'uniform'"
            )

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        t, r = self.times(n, rng)
        first, second, third = (quota(n, i / 4) for i in (1, 2, 3))
        t = torch.cat([torch.ones_like(t[:first]), t[first:]])
        short = (t - self.shortening * (t - r))[first:second]
        return t, torch.cat([torch.zeros_like(r[:first]), short, r[second:third], t[third:]])

    def num_off_diagonal(self, n: int) -> int:
        return quota(n, 3 / 4)

    def num_one_step(self, n: int) -> int:
        """How many of the n rows, the first ones, have t = 1 and r = 0."""
        return quota(n, 1 / 4)


@dataclass(frozen=True, kw_only=True)
class _PartlyToData:
    """A law of which the first rows, a share of those with r < t, have r = 0."""

    times: TimeLaw
    share: float

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        t, r = self.times(n, rng)
        k = quota(self.num_off_diagonal(n), self.share)
        return t, torch.cat([torch.zeros_like(r[:k]), r[k:]])

    def num_off_diagonal(self, n: int) -> int:
        return self.times.num_off_diagonal(n)
