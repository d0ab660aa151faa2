"""How long a run trains: a number of steps, images or seconds.

Schedules read the share of it that is spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Counters(Protocol):
    """What a run has used so far; `seconds` counts training alone."""

    step: int
    images: int

    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Exactly one of steps, images and seconds; only training counts as seconds.

    Evaluation and checkpoints take none of them.
    """

    steps: int | None = None
    images: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: amount for name, amount in vars(self).items() if amount is not None}
        if len(given) != 1:
            raise ValueError(
                f"a budget is exactly one of steps, images and seconds; given: "
                f"{given or 'none of them'}"
            )
        if not self.amount > 0:
            raise ValueError(f"the budget of {self.amount} {self.unit} must be positive")

    @property
    def unit(self) -> str:
        if self.steps is not None:
            return "steps"
        return "images" if self.images is not None else "seconds"

    @property
    def amount(self) -> float:
        return next(a for a in (self.steps, self.images, self.seconds) if a is not None)

    def spent(self, state: Counters) -> float:
        """What is spent, in the budget's own unit."""
        if self.steps is not None:
            return state.step
        return state.images if self.images is not None else state.seconds

    def progress(self, state: Counters) -> float:
        """The share that is spent, in [0, 1]."""
        return min(1.0, self.spent(state) / self.amount)

    def done(self, state: Counters) -> bool:
        """Whether all is spent; the shortest budget has one step, which later figures divide by."""
        return state.step > 0 and self.spent(state) >= self.amount
