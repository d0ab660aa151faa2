"""Ranges of settings, as annotations: `depth: Count = 6` takes whole numbers from 1 on.

What a gin file binds is checked against them before anything is built
(registry/configuration/gin_values.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; `open_below` leaves `least` itself out."""

    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.open_below else value >= self.least
        return above and value <= self.most

    @property
    def words(self) -> str:
        """The end of a sentence such as "must be a number from 0 to 1"."""
        if self.most < math.inf:
            return f"from {self.least} to {self.most}"
        return f"above {self.least:g}" if self.open_below else f"of {self.least:g} or more"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_below=True)]
NotNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
