"""What the law of times of an objective decides beside its draws."""

from __future__ import annotations

from registry.protocols import TimeLaw
from zoo.times.draws import reaches


class DrawsSteps:
    """An objective whose field `times` draws every step that it trains."""

    times: TimeLaw

    def trains_step(self, t: float, r: float) -> bool:
        """Whether the time law draws such a step."""
        return reaches(self.times, t, r)


class SplitsSteps(DrawsSteps):
    """One whose rows with r < t take a derivative, apart from the others."""

    @property
    def splits_batch(self) -> bool:
        """Whether there are rows of both kinds."""
        n = 64  # like any number of rows
        return 0 < self.times.num_off_diagonal(n) < n
