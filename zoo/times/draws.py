"""What laws of times are made of, and what objectives ask them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from registry.protocols import TimeLaw

MANY, _SAME = 10**6, 1e-6  # rows; a difference of times that is rounding


def uniform_draws(n: int, rng: torch.Generator) -> Tensor:
    """n independent draws from U[0, 1)."""
    return torch.rand(n, generator=rng, device=rng.device)


def logit_normal_draws(n: int, mean: float, std: float, rng: torch.Generator) -> Tensor:
    """n independent draws of sigmoid(mean + std z), z ~ N(0, 1)."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=rng, device=rng.device))


def logit_normal_cdf(t: Tensor, mean: float, std: float) -> Tensor:
    """The probability that sigmoid(mean + std z), z ~ N(0, 1), is at most t."""
    return torch.special.ndtr((torch.logit(t) - mean) / std)


def quota(n: int, fraction: float) -> int:
    """A fraction of n rows as a number of rows, rounded up."""
    return math.ceil(n * fraction - 1e-9)


def check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value!r} is not a fraction in [0, 1]")


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value!r} must be positive")


def check_every_row(name: str, law: TimeLaw, why: str) -> None:
    """ValueError, which says why, for a law of which some rows have r = t."""
    if law.num_off_diagonal(MANY) < MANY:
        raise ValueError(
            f"{name} draws r = t in some rows, {why}. Draw r < t in every row "
            "(off_diagonal_fraction = 1.0)"
        )


def law_at(law: Any, step: int) -> Any:
    """The law of this step of the run: the law itself, unless it has an `at_step`."""
    return law.at_step(step) if hasattr(law, "at_step") else law


def reaches(law: TimeLaw, t: float, r: float) -> bool:
    """Whether the law draws steps like (t, r): on the diagonal, to the data, or in between.

    A law that draws rows with r < t is taken to reach all of them, unless its `only_to_data` says
    that their r is 0. It is taken to reach the diagonal, at least as a limit.
    """
    if t - r <= _SAME:
        return True
    only_to_data = getattr(law, "only_to_data", False)
    return law.num_off_diagonal(MANY) > 0 and (r <= _SAME or not only_to_data)
