"""Laws with r < t in a share of the rows, two draws each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from registry import time_laws
from zoo.times.draws import (
    check_fraction,
    check_positive,
    logit_normal_cdf,
    logit_normal_draws,
    quota,
    uniform_draws,
)
from zoo.times.sources import MEAN_FLOW, SOFLOW

Diagonal = Literal["larger", "uniform"]


@time_laws.register("uniform_pair")
@dataclass(frozen=True, kw_only=True)
class UniformPair:
    """t and r are the larger and smaller of two uniform draws; r = t outside the quota.

    There t is the larger of two draws too, or, with diagonal = "uniform", a draw of its own.
    """

    off_diagonal_fraction: float = 0.25
    diagonal: Diagonal = "larger"

    def __post_init__(self) -> None:
        check_fraction("uniform_pair.off_diagonal_fraction", self.off_diagonal_fraction)
        if self.diagonal not in get_args(Diagonal):
            raise ValueError(
                f"uniform_pair.diagonal = {self.diagonal!r}; allowed: "
                f"{', '.join(get_args(Diagonal))}"
            )

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        first, second = uniform_draws(n, rng), uniform_draws(n, rng)
        k = self.num_off_diagonal(n)
        if self.diagonal == "uniform":
            second = torch.cat([second[:k], first[k:]])
        return _sorted_pair(first, second, k)

    def num_off_diagonal(self, n: int) -> int:
        return quota(n, self.off_diagonal_fraction)

    def cdf(self, t: Tensor) -> Tensor:
        if self.diagonal == "larger":
            return t**2
        share = self.off_diagonal_fraction
        return share * t**2 + (1 - share) * t


@time_laws.register("logit_normal_pair")
@dataclass(frozen=True, kw_only=True)
class LogitNormalPair:
    """t and r are the larger and smaller of two logit-normal draws; r = t outside the quota."""

    reference: ClassVar = MEAN_FLOW

    mean: float = -0.4
    std: float = 1.0
    off_diagonal_fraction: float = 0.25

    def __post_init__(self) -> None:
        check_positive("logit_normal_pair.std", self.std)
        check_fraction("logit_normal_pair.off_diagonal_fraction", self.off_diagonal_fraction)

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        first = logit_normal_draws(n, self.mean, self.std, rng)
        second = logit_normal_draws(n, self.mean, self.std, rng)
        return _sorted_pair(first, second, self.num_off_diagonal(n))

    def num_off_diagonal(self, n: int) -> int:
        return quota(n, self.off_diagonal_fraction)

    def cdf(self, t: Tensor) -> Tensor:
        return logit_normal_cdf(t, self.mean, self.std) ** 2


RLaw = Literal["uniform", "zero", "mix"]


@time_laws.register("beta_pair")
@dataclass(frozen=True, kw_only=True)
class BetaPair:
    """t ~ Beta(a, b); r ~ U[0, t), 0, or half of each; r = t outside the off-diagonal quota."""

    a: float = 1.0
    b: float = 1.0
    r_law: RLaw = "uniform"
    off_diagonal_fraction: float = 0.9

    def __post_init__(self) -> None:
        check_positive("beta_pair.a", self.a)
        check_positive("beta_pair.b", self.b)
        check_fraction("beta_pair.off_diagonal_fraction", self.off_diagonal_fraction)
        if self.r_law not in get_args(RLaw):
            raise ValueError(
                f"beta_pair.r_law = {self.r_law!r}; allowed: {', '.join(get_args(RLaw))}"
            )

    @property
    def only_to_data(self) -> bool:
        return self.r_law == "zero"

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        t = self._beta(n, rng)
        shares = uniform_draws(n, rng)
        k = self.num_off_diagonal(n)
        num_uniform = {"uniform": k, "zero": 0, "mix": k // 2}[self.r_law]
        r = torch.cat([(shares * t)[:num_uniform], torch.zeros_like(t[num_uniform:k]), t[k:]])
        return t, r

    def num_off_diagonal(self, n: int) -> int:
        return quota(n, self.off_diagonal_fraction)

    def cdf(self, t: Tensor) -> Tensor:
        from scipy.special import betainc  # slow to import, and asked for by checks alone

        return torch.as_tensor(betainc(self.a, self.b, t.double().numpy()))

    def _beta(self, n: int, rng: torch.Generator) -> Tensor:
        if self.a == self.b == 1.0:
            return uniform_draws(n, rng)
        # Beta(a, b) = A / (A + B) for gamma variables; torch has no beta draw with a generator.
        shapes = torch.tensor([[self.a], [self.b]], device=rng.device).expand(2, n).contiguous()
        gammas = torch._standard_gamma(shapes, generator=rng)
        return gammas[0] / gammas.sum(0)


Pairing = Literal["sorted", "limited"]


@time_laws.register("two_logit_normals")
@dataclass(frozen=True, kw_only=True)
class TwoLogitNormals:
    """t and r are logit-normal with laws of their own; r = t, with a third law, outside the quota.

    With `pairing` "sorted" t is the larger and r the smaller of the two draws (DMF). With "limited"
    t and r keep their roles, t is at least `gap` and r at most t - gap (SoFlow). The defaults are
    those of SoFlow's released code.
    """

    reference: ClassVar = SOFLOW

    t_mean: float = 0.2
    t_std: float = 0.8
    r_mean: float = -1.0
    r_std: float = 0.8
    diagonal_mean: float = -0.2
    diagonal_std: float = 1.0
    off_diagonal_fraction: float = 0.25
    pairing: Pairing = "limited"
    gap: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("t_std", "r_std", "diagonal_std", "gap"):
            check_positive(f"two_logit_normals.{name}", getattr(self, name))
        check_fraction("two_logit_normals.off_diagonal_fraction", self.off_diagonal_fraction)
        if self.pairing not in get_args(Pairing):
            raise ValueError(
                f"two_logit_normals.pairing = {self.pairing!r}; allowed: "
                f"{', '.join(get_args(Pairing))}"
            )

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        t = logit_normal_draws(n, self.t_mean, self.t_std, rng)
        r = logit_normal_draws(n, self.r_mean, self.r_std, rng)
        diagonal = logit_normal_draws(n, self.diagonal_mean, self.diagonal_std, rng)
        if self.pairing == "sorted":
            t, r = torch.maximum(t, r), torch.minimum(t, r)
        else:
            t = t.clamp_min(self.gap)
            r = torch.minimum(r, t - self.gap).clamp_min(0)
        k = self.num_off_diagonal(n)
        return torch.cat([t[:k], diagonal[k:]]), torch.cat([r[:k], diagonal[k:]])

    def num_off_diagonal(self, n: int) -> int:
        return quota(n, self.off_diagonal_fraction)

    def cdf(self, t: Tensor) -> Tensor:
        later = logit_normal_cdf(t, self.t_mean, self.t_std)
        if self.pairing == "sorted":
            later = later * logit_normal_cdf(t, self.r_mean, self.r_std)
        share = self.off_diagonal_fraction
        diagonal = logit_normal_cdf(t, self.diagonal_mean, self.diagonal_std)
        return share * later + (1 - share) * diagonal


def _sorted_pair(first: Tensor, second: Tensor, num_off_diagonal: int) -> tuple[Tensor, Tensor]:
    t, low = torch.maximum(first, second), torch.minimum(first, second)
    return t, torch.cat([low[:num_off_diagonal], t[num_off_diagonal:]])
