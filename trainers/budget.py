"""How long a run trains: steps, images or seconds. Schedules read the share that is spent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Spent(Protocol):
    """What a run has used so far; `seconds` counts training alone."""

    step: int
    images: int

    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Exactly one of steps, images and training seconds (evaluation and checkpoints are free)."""

    steps: int | None = None
    images: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: amount for name, amount in vars(self).items() if amount is not None}
        if len(given) != 1:
            raise ValueError(
                f"a budget is one of steps, images and seconds; given: {given or 'none of them'}"
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

    def spent(self, state: Spent) -> float:
        """In the budget's own unit."""
        if self.steps is not None:
            return state.step
        return state.images if self.images is not None else state.seconds

    def progress(self, state: Spent) -> float:
        """The share that is spent, in [0, 1]."""
        return min(1.0, self.spent(state) / self.amount)

    def done(self, state: Spent) -> bool:
        return self.spent(state) >= self.amount
