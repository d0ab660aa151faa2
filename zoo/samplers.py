"""Samplers: from noise at t=1 to data at t=0 in a declared number of network evaluations (NFE).

    flow_map   x <- x - (t - r) u(x, t, r) on an even grid; one step is x1 - u(x1, 1, 0)
    euler      x <- x - (t - r) v(x, t); first order
    heun       the trapezoidal rule on v, two evaluations a step; second order
    restart    jump to t=0, renoise to the next time with fresh noise, jump again
    mix        flow map from noise to the first time, Euler on v, then one jump to t=0
    cfg, input_guidance   another sampler with guidance, by two rows a sample or told to the network

`restart` keeps the data's law exactly when the jump is exact. A head that was trained at r=0 only
must be sampled by `restart`: recombining its jump with the noise that it started from,
`(1 - t') x0hat + t' x1hat`, has the wrong variance.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from registry import paths, samplers
from registry.protocols import Cond, Network, Path, Reference, Sampler
from zoo.guidance import check_interval, inside, unlabelled, velocity_at
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

    heads: ClassVar[tuple[str, ...]] = ("u",)

    nfe: int = 1

    def __post_init__(self) -> None:
        _check_nfe("flow_map", self.nfe)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        x, times = x1, even_times(self.nfe)
        for t, r in zip(times, times[1:], strict=False):
            x = jump(net, x, t, r, cond)
        return x


@samplers.register("euler")
@dataclass(frozen=True, kw_only=True)
class Euler:
    """Euler steps on the velocity, optionally shifted towards the noise."""

    heads: ClassVar[tuple[str, ...]] = ("v", "u")

    nfe: int = 50
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_nfe("euler", self.nfe)
        _check_shift("euler", self.shift)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        x, times = x1, shifted(even_times(self.nfe), self.shift)
        for t, r in zip(times, times[1:], strict=False):
            x = euler_step(net, x, t, r, cond)
        return x


@samplers.register("heun")
@dataclass(frozen=True, kw_only=True)
class Heun:
    """Heun steps on the velocity; an odd number of evaluations ends with one Euler step."""

    heads: ClassVar[tuple[str, ...]] = ("v", "u")

    nfe: int = 50
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check_nfe("heun", self.nfe)
        _check_shift("heun", self.shift)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        num_steps = (self.nfe + 1) // 2
        x, times = x1, shifted(even_times(num_steps), self.shift)
        for i, (t, r) in enumerate(zip(times, times[1:], strict=False)):
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
    """Jump to the data, add fresh noise, jump again; as consistency models are sampled."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    reference: ClassVar = Reference(
        title="Consistency Models", authors="Song et al.", year=2023, arxiv="2303.01469"
    )

    nfe: int = 1
    t_min: float | None = None  # the last time noise is added; None spaces all times evenly
    path: Path = field(default_factory=Linear)

    def __post_init__(self) -> None:
        _check_nfe("restart", self.nfe)
        _check_time("restart.t_min", self.t_min)

    def times(self) -> list[float]:
        """The nfe times that are jumped from, the first being 1."""
        low = 1 / self.nfe if self.t_min is None else self.t_min
        return _between(1.0, low, self.nfe)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        x = jump(net, x1, 1.0, 0.0, cond)
        for t in self.times()[1:]:
            noisy = self.path.sample(x, normal_like(x, rng), _full(x, t)).x_t
            x = jump(net, noisy, t, 0.0, cond)
        return x


@samplers.register("mix")
@dataclass(frozen=True, kw_only=True)
class Mix:
    """Noise-to-noisy jump, Euler steps on the velocity, one jump to the data; DE-CM's own.

    The paper's switch point is not public: `t_switch` is the time of the last jump (our reading).
    """

    heads: ClassVar[tuple[str, ...]] = ("u",)
    reference: ClassVar = Reference(
        title="Dual-End Consistency Model", authors="Dong et al.", year=2026, arxiv="2602.10764"
    )

    nfe: int = 2
    t_switch: float = 0.5

    def __post_init__(self) -> None:
        _check_nfe("mix", self.nfe)
        _check_time("mix.t_switch", self.t_switch)

    def times(self) -> list[float]:
        """The nfe times that the network is evaluated at, the first being 1."""
        return _between(1.0, self.t_switch, self.nfe)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        if self.nfe == 1:
            return jump(net, x1, 1.0, 0.0, cond)
        times = self.times()
        x = jump(net, x1, 1.0, times[1], cond)
        for t, r in zip(times[1:], times[2:], strict=False):
            x = euler_step(net, x, t, r, cond)
        return jump(net, x, times[-1], 0.0, cond)


class _Wrapping:
    """A sampler that changes what another one, its field `sampler`, is given."""

    heads: ClassVar[tuple[str, ...]] = ()  # those of the other

    nfe: int
    sampler: Sampler
    scale: float
    interval: tuple[float, float]

    @property
    def guidance_scale(self) -> float:
        return self.scale

    def inner(self) -> Sampler:
        replace: Any = dataclasses.replace  # a Protocol cannot say "a dataclass"
        return replace(self.sampler, nfe=self.nfe)

    def __post_init__(self) -> None:
        name = samplers.name_of(self)
        _check_nfe(name, self.nfe)
        check_interval(f"{name}.interval", self.interval)
        self.inner()


@samplers.register("cfg")
@dataclass(frozen=True, kw_only=True)
class ClassifierFree(_Wrapping):
    """Classifier-free guidance inside an interval of times: null + scale (given - null).

    Both are rows of one network call, so that a call inside the interval costs as much as two.
    """

    reference: ClassVar = Reference(
        title="Applying Guidance in a Limited Interval Improves Sample and Distribution Quality",
        authors="Kynkäänniemi et al.",
        year=2024,
        arxiv="2404.07724",
    )

    nfe: int = 50
    sampler: Sampler = field(default_factory=Euler)
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        guided = guided_network(net, self.scale, self.interval)
        return self.inner()(guided, x1, cond, rng)


@samplers.register("input_guidance")
@dataclass(frozen=True, kw_only=True)
class InputGuidance(_Wrapping):
    """The scale and interval of guidance as inputs of a network that was trained with them."""

    nfe: int = 1
    sampler: Sampler = field(default_factory=FlowMap)
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale >= 1:
            raise ValueError(
                f"input_guidance.scale = {self.scale!r} must be at least 1, where there is none"
            )

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        told = x1.new_tensor([self.scale, *self.interval]).expand(len(x1), 3)
        return self.inner()(net, x1, {**(cond or {}), "guidance": told}, rng)


def guided_network(net: Network, scale: float, interval: tuple[float, float]) -> Network:
    """The network whose u and v are guided at times inside the interval, the same for all rows."""

    def guided(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
        if scale == 1 or not bool(inside(t, interval).all()):
            return net(x, t, r, cond)
        null = unlabelled(cond)
        both = {name: torch.cat([value, null[name]]) for name, value in (cond or {}).items()}
        out = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([r, r]), both)
        halves = {key: value.chunk(2) for key, value in out.items()}
        return {
            key: without + scale * (given - without) if key in ("u", "v") else given
            for key, (given, without) in halves.items()
        }

    return guided


def jump(net: Network, x: Tensor, t: float, r: float, cond: Cond | None) -> Tensor:
    """The flow map x - (t - r) u(x, t, r) at equal times for all rows."""
    return x - (t - r) * net(x, _full(x, t), _full(x, r), cond)["u"]


def euler_step(net: Network, x: Tensor, t: float, r: float, cond: Cond | None) -> Tensor:
    """x - (t - r) v(x, t) at equal times for all rows."""
    return x - (t - r) * velocity_at(net, x, _full(x, t), cond)


def valid_samplers(objective: Any) -> tuple[str, ...]:
    """The samplers that the objective names, else every one whose outputs it trains."""
    declared = getattr(objective, "samplers", None)
    if declared is not None:
        return tuple(declared)
    return tuple(
        name for name in samplers.names() if set(samplers.get(name).heads) & set(objective.heads)
    )


def check_sampler(name: str, objective: Any, sampler: Any) -> None:
    """ValueError unless the sampler is valid for the objective `name`, and on the same path."""
    if isinstance(sampler, _Wrapping):
        return check_sampler(name, objective, sampler.sampler)
    valid = valid_samplers(objective)
    chosen = samplers.name_of(sampler)
    if chosen not in valid:
        raise ValueError(
            f"objective {name!r} cannot use sampler {chosen!r}: it trains the outputs "
            f"{', '.join(objective.heads)} and is valid for {', '.join(valid) or 'no sampler'}. "
            f"Bind run.sampler = @{valid[0] if valid else 'SAMPLER'}()"
        )
    path = getattr(objective, "path", None)
    if path is not None and getattr(sampler, "path", path) != path:
        raise ValueError(
            f"sampler {chosen!r} adds noise along {sampler.path}, but objective {name!r} trains on "
            f"{path}. Bind {chosen}.path = @{paths.name_of(path)}()"
        )


def _full(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def _between(first: float, last: float, n: int) -> list[float]:
    """n equally spaced values from first to last; for n = 1 the first alone."""
    return [first + (last - first) * i / max(n - 1, 1) for i in range(n)]


def _check_nfe(name: str, nfe: int) -> None:
    if not (isinstance(nfe, int) and nfe >= 1):
        raise ValueError(f"{name}.nfe = {nfe!r} must be a positive integer")


def _check_shift(name: str, shift: float) -> None:
    if not shift > 0:
        raise ValueError(f"{name}.shift = {shift!r} must be positive")


def _check_time(name: str, t: float | None) -> None:
    if t is not None and not 0 < t < 1:
        raise ValueError(f"{name} = {t!r} must lie strictly between 0 and 1")
