"""Samplers: from noise at t=1 to data at t=0 in a declared number of network evaluations (NFE).

    flow_map   x <- x - (t - r) u(x, t, r) on an even grid; one step is x1 - u(x1, 1, 0)
    euler      x <- x - (t - r) v(x, t); first order
    heun       the trapezoidal rule on v, two evaluations a step; second order
    restart    jump to t=0, renoise to the next time with fresh noise, jump again
    mix        flow map from noise to the first time, Euler on v, then one jump to t=0
    one_step   x1 - u(x1, 1, 0), and nothing else

Each says in `needs` what an objective must have trained (registry/sampling.py). `restart` keeps the
data's law if the jump is exact. To combine its jump with the noise that the jump started from,
`(1 - t') x0hat + t' x1hat`, would give the wrong variance.

u and v belong to the path that they were trained on, and a step along them is right on any path.
Only `restart` makes points of the path itself: it does so on the path of the objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from registry import samplers
from registry.protocols import Cond, Network, Path, Reference
from zoo.guidance import velocity_at
from zoo.ops import normal_like
from zoo.paths import Linear


def even_times(nfe: int) -> list[float]:
    """1 = t_0 > ... > t_nfe = 0 with equal spacing."""
    return [1 - i / nfe for i in range(nfe)] + [0.0]


def shifted(times: list[float], shift: float) -> list[float]:
    """t <- s t / (1 + (s - 1) t): a shift above 1 spends more steps near the noise."""
    return [shift * t / (1 + (shift - 1) * t) for t in times]


@samplers.register("flow_map")
@dataclass(frozen=True, kw_only=True)
class FlowMap:
    """Steps of the average velocity on an even grid; deterministic."""

    needs: ClassVar[tuple[str, ...]] = ("even_steps",)

    nfe: int = 1

    def __post_init__(self) -> None:
        check_nfe("flow_map", self.nfe)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        x, times = x1, even_times(self.nfe)
        for t, r in pairwise(times):
            x = jump(net, x, t, r, cond)
        return x


@samplers.register("euler")
@dataclass(frozen=True, kw_only=True)
class Euler:
    """Euler steps on the velocity, optionally shifted towards the noise."""

    needs: ClassVar[tuple[str, ...]] = ("velocity",)

    nfe: int = 50
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_nfe("euler", self.nfe)
        _check_shift("euler", self.shift)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        x, times = x1, shifted(even_times(self.nfe), self.shift)
        for t, r in pairwise(times):
            x = euler_step(net, x, t, r, cond)
        return x


@samplers.register("heun")
@dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun steps on the velocity; an odd number of evaluations ends with one Euler step."""

    needs: ClassVar[tuple[str, ...]] = ("velocity",)

    nfe: int = 50
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_nfe("heun", self.nfe)
        _check_shift("heun", self.shift)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        num_steps = (self.nfe + 1) // 2
        x, times = x1, shifted(even_times(num_steps), self.shift)
        for i, (t, r) in enumerate(pairwise(times)):
            v = velocity_at(net, x, _full(x, t), cond)
            end = x - (t - r) * v
            if 2 * i + 1 < self.nfe:
                v = (v + velocity_at(net, end, _full(x, r), cond)) / 2
                end = x - (t - r) * v
            x = end
        return x


@samplers.register("restart")
@dataclass(frozen=True, kw_only=True)
class Restart:
    """The sampler of consistency models: jump to the data, add fresh noise, jump again."""

    needs: ClassVar[tuple[str, ...]] = ("map_to_data",)
    reference: ClassVar = Reference(
        title="Consistency Models", authors="Song et al.", year=2023, arxiv="2303.01469"
    )

    nfe: int = 1
    t_min: float | None = None  # the last time that noise is added; None spaces all times evenly
    path: Path | None = None  # None is the objective's; linear for a sampler that is used alone

    def __post_init__(self) -> None:
        check_nfe("restart", self.nfe)
        _check_time("restart.t_min", self.t_min)

    def times(self) -> list[float]:
        """The nfe times at which jumps start; the first is 1."""
        low = 1 / self.nfe if self.t_min is None else self.t_min
        return _between(1.0, low, self.nfe)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        x, path = jump(net, x1, 1.0, 0.0, cond), self.path or Linear()
        for t in self.times()[1:]:
            noisy = path.sample(x, normal_like(x, rng), _full(x, t)).x_t
            x = jump(net, noisy, t, 0.0, cond)
        return x


@samplers.register("mix")
@dataclass(frozen=True, kw_only=True)
class Mix:
    """DE-CM's sampler: a noise-to-noisy jump, Euler steps, one jump to the data.

    The paper's switch point is not public: `t_switch` is the time of the last jump (our reading).
    Readers of the paper differ about the first step; others begin with the Euler steps.
    """

    needs: ClassVar[tuple[str, ...]] = ("map_from_noise", "velocity", "map_to_data")
    reference: ClassVar = Reference(
        title="Dual-End Consistency Model", authors="Dong et al.", year=2026, arxiv="2602.10764"
    )

    nfe: int = 2
    t_switch: float = 0.5

    def __post_init__(self) -> None:
        check_nfe("mix", self.nfe)
        _check_time("mix.t_switch", self.t_switch)

    def times(self) -> list[float]:
        """The nfe times at which the network is evaluated; the first is 1."""
        return _between(1.0, self.t_switch, self.nfe)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        if self.nfe == 1:
            return jump(net, x1, 1.0, 0.0, cond)
        times = self.times()
        x = jump(net, x1, 1.0, times[1], cond)
        for t, r in pairwise(times[1:]):
            x = euler_step(net, x, t, r, cond)
        return jump(net, x, times[-1], 0.0, cond)


@samplers.register("one_step")
@dataclass(frozen=True, kw_only=True)
class OneStep:
    """The single step of a one-step generator, x1 - u(x1, 1, 0); it has no more evaluations."""

    needs: ClassVar[tuple[str, ...]] = ("law",)

    nfe: int = 1

    def __post_init__(self) -> None:
        check_nfe("one_step", self.nfe)
        if self.nfe != 1:
            raise ValueError(
                f"one_step.nfe = {self.nfe!r} must be 1: it takes one step from the noise to the "
                "data, and nothing in between is trained"
            )

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        return jump(net, x1, 1.0, 0.0, cond)


def jump(net: Network, x: Tensor, t: float, r: float, cond: Cond | None) -> Tensor:
    """The flow map x - (t - r) u(x, t, r) at equal times for all rows."""
    return x - (t - r) * net(x, _full(x, t), _full(x, r), cond)["u"]


def euler_step(net: Network, x: Tensor, t: float, r: float, cond: Cond | None) -> Tensor:
    """x - (t - r) v(x, t) at equal times for all rows."""
    return x - (t - r) * velocity_at(net, x, _full(x, t), cond)


def check_nfe(name: str, nfe: int, field: str = "nfe") -> None:
    """ValueError unless nfe is a positive integer; `name` is the sampler's registered name."""
    if not (isinstance(nfe, int) and nfe >= 1):
        raise ValueError(f"{name}.{field} = {nfe!r} must be a positive integer")


def _full(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def _between(first: float, last: float, n: int) -> list[float]:
    """n equally spaced values from first to last; for n = 1 the first alone."""
    return [first + (last - first) * i / max(n - 1, 1) for i in range(n)]


def _check_shift(name: str, shift: float) -> None:
    if not shift > 0:
        raise ValueError(f"{name}.shift = {shift!r} must be positive")


def _check_time(name: str, t: float | None) -> None:
    if t is not None and not 0 < t < 1:
        raise ValueError(f"{name} = {t!r} must lie strictly between 0 and 1")
