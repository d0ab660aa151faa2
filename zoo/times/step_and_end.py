"""A time law that draws the length of a step and where it ends.

`step_and_end` is the law of TVM (Zhou et al., arXiv 2511.19797) as its released code has it: the
length is logit-normal, and r is logit-normal among the times that leave room for the step:

    l = sigmoid(N(-0.8, 1)),   r = sigmoid(N(-0.4, 1)) given that r <= 1 - l,   t = r + l
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from registry import time_laws
from registry.ranges import Positive
from zoo.times.draws import check_positive, uniform_draws
from zoo.times.sources import TERMINAL_VELOCITY


@time_laws.register("step_and_end")
@dataclass(frozen=True, kw_only=True)
class StepAndEnd:
    """A logit-normal length t - r in every row, and a logit-normal r that leaves room for it."""

    reference: ClassVar = TERMINAL_VELOCITY

    length_mean: float = -0.8
    length_std: Positive = 1.0
    r_mean: float = -0.4
    r_std: Positive = 1.0

    def __post_init__(self) -> None:
        check_positive("step_and_end.length_std", self.length_std)
        check_positive("step_and_end.r_std", self.r_std)

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        length = self.length_mean + self.length_std * torch.randn(
            n, generator=rng, device=rng.device
        )
        largest = torch.special.ndtr((-length - self.r_mean) / self.r_std)  # of r = 1 - l
        quantile = torch.special.ndtri(uniform_draws(n, rng) * largest)
        r = torch.sigmoid(self.r_mean + self.r_std * quantile)
        return (r + torch.sigmoid(length)).clamp_max(1), r

    def num_off_diagonal(self, n: int) -> int:
        return n
