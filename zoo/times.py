"""Time laws draw (t, r) with 0 <= r <= t <= 1; the rows with r < t come first.

How many rows have r < t is a fixed function of n, so that objectives slice rows instead of masking
them and every rank has the same control flow.

`logit_normal_pair` is MeanFlow's law (Geng et al., arXiv 2505.13447): t is the maximum and r the
minimum of two draws of sigmoid(N(mean, std^2)). On the diagonal rows r is then set to t, so their t
is a maximum of two draws too. `beta_pair` is the law of RCGM and TwinFlow as read from their code:
t ~ Beta(a, b), r ~ U[0, t].

`progressive` changes over the run. At step i the share (2 / pi) arccos(i / steps) of another law's
rows with r < t have r = 0 instead: all of them at first, none from `steps` on. From ESC (arXiv
2512.11831) and its released code: the share. The commands of the code have 20,000 steps. The code
draws which rows these are, here they are the first.

`quarters` is TwinFlow's law, as its released code has it: a quarter of the rows each for steps from
noise to data, steps of at most a twentieth of t, any steps, and none (r = t).

`arctan_normal` is FACM's law (Peng et al., arXiv 2507.03738, its released code): t is the angle of
a noise level exp(N(mean, std^2)) over a data level of 1, in quarters of a circle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from registry import time_laws
from registry.protocols import Reference, TimeLaw
from registry.ranges import Count

MEAN_FLOW = Reference(
    title="Mean Flows for One-step Generative Modeling",
    authors="Geng et al.",
    year=2025,
    arxiv="2505.13447",
)
SOFLOW = Reference(
    title="SoFlow: Solution Flow Models for One-Step Generative Modeling",
    authors="Luo et al.",
    year=2025,
    arxiv="2512.15657",
)
TWINFLOW = Reference(
    title="TwinFlow: Realizing One-step Generation on Large Models with Self-adversarial Flows",
    authors="Cheng et al.",
    year=2025,
    arxiv="2512.05150",
)
FLOW_ANCHORED = Reference(
    title="Flow-Anchored Consistency Models",
    authors="Peng et al.",
    year=2025,
    arxiv="2507.03738",
)

_MANY, _SAME = 10**6, 1e-6  # rows; a difference of times that is rounding


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
    return law.num_off_diagonal(_MANY) > 0 and (r <= _SAME or not only_to_data)


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


@time_laws.register("progressive")
@dataclass(frozen=True, kw_only=True)
class Progressive:
    """Another law, with r = 0 in a share of its rows with r < t that falls from all to none."""

    reference: ClassVar = Reference(
        title="On the Design of One-step Diffusion via Shortcutting Flow Paths",
        authors="Lin et al.",
        year=2025,
        arxiv="2512.11831",
    )

    times: TimeLaw = field(default_factory=LogitNormalPair)
    steps: Count = 10_000

    def __post_init__(self) -> None:
        name = time_laws.name_of(self.times)
        if not self.times.num_off_diagonal(_MANY):
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
        if self.times.num_off_diagonal(_MANY) < _MANY or getattr(self.times, "only_to_data", False):
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


def _sorted_pair(first: Tensor, second: Tensor, num_off_diagonal: int) -> tuple[Tensor, Tensor]:
    t, low = torch.maximum(first, second), torch.minimum(first, second)
    return t, torch.cat([low[:num_off_diagonal], t[num_off_diagonal:]])
