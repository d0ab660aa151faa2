"""Laws with r = t in every row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from registry import time_laws
from zoo.times.draws import (
    check_positive,
    logit_normal_cdf,
    logit_normal_draws,
    uniform_draws,
)
from zoo.times.sources import FLOW_ANCHORED


class _Diagonal:
    """A law of t alone, with r = t in every row."""

    def num_off_diagonal(self, n: int) -> int:
        return 0


@time_laws.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(_Diagonal):
    """t ~ U[0, 1), r = t."""

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        t = uniform_draws(n, rng)
        return t, t

    def cdf(self, t: Tensor) -> Tensor:
        return t


@time_laws.register("logit_normal")
@dataclass(frozen=True, kw_only=True)
class LogitNormal(_Diagonal):
    """t = sigmoid(N(mean, std^2)), r = t."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_positive("logit_normal.std", self.std)

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        t = logit_normal_draws(n, self.mean, self.std, rng)
        return t, t

    def cdf(self, t: Tensor) -> Tensor:
        return logit_normal_cdf(t, self.mean, self.std)


@time_laws.register("arctan_normal")
@dataclass(frozen=True, kw_only=True)
class ArctanNormal(_Diagonal):
    """tan(pi t / 2) = exp(N(mean, std^2)), the noise level on the path `trigflow`; r = t."""

    reference: ClassVar = FLOW_ANCHORED

    mean: float = -0.8
    std: float = 1.6

    def __post_init__(self) -> None:
        check_positive("arctan_normal.std", self.std)

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        levels = (self.mean + self.std * torch.randn(n, generator=rng, device=rng.device)).exp()
        t = 2 / math.pi * torch.arctan(levels)
        return t, t

    def cdf(self, t: Tensor) -> Tensor:
        level = torch.tan(math.pi / 2 * t).clamp_min(0).log()  # at t = 1 rounding may change signs
        return torch.where(t < 1, torch.special.ndtr((level - self.mean) / self.std), 1)


@time_laws.register("stratified")
@dataclass(frozen=True, kw_only=True)
class Stratified(_Diagonal):
    """One uniform draw of t in each of n equal bins, in random order; r = t."""

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        bins = torch.randperm(n, generator=rng, device=rng.device)
        t = (bins + uniform_draws(n, rng)) / n
        return t, t

    def cdf(self, t: Tensor) -> Tensor:
        return t


Diagonal = Literal["larger", "uniform"]
