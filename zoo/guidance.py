"""Label dropout and classifier-free guidance inside a training target.

A target of the form `v_c + a (v(y) - v(null))` with the network's own v has the guided velocity of
scale 1 / (1 - a) as its fixed point; MeanFlow's `omega v_c + (1 - omega - kappa) u(null) +
kappa u(y)` has scale omega / (1 - kappa). Rows whose label was dropped keep the unguided target.

With a guidance law each row draws its own scale w and interval, which are inputs of the network,
and a is 1 - 1/w inside the interval. The scale is then chosen when sampling. From iMF (Geng et al.,
arXiv 2512.02012): density of w proportional to 1/w on [1, 8], low ~ U(0, 0.5), high ~ U(0.5, 1),
and the whole interval for rows with r = t.

So at r = t a network has learned the whole interval alone, and every question at r = t tells it
that one, with the scale w inside the row's own interval and 1 outside. Both velocities of a target
are such questions, and the one without a label has scale 1. The released code of iMF asks in the
same way. That samplers of the velocity ask so too is our reading: its code samples the map alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from registry import guidance_laws
from registry.protocols import NULL_LABEL, Cond, GuidanceLaw, Network
from zoo.ops import like, rms
from zoo.times.sources import IMPROVED_MEAN_FLOW, TERMINAL_VELOCITY


@runtime_checkable
class Guided(Protocol):
    """An objective or sampler whose samples are guided with this scale; 1 is no guidance."""

    @property
    def guidance_scale(self) -> float: ...


@runtime_checkable
class PartlyGuided(Guided, Protocol):
    """A guided objective that teaches the guidance to some steps alone."""

    def guides(self, t: float, r: float) -> bool: ...


def drop_labels(
    cond: Cond | None, probability: float, rng: torch.Generator, n: int
) -> tuple[Cond | None, Tensor]:
    """The conditioning with labels replaced by the null label, each with this probability.

    It also returns the mask [n] of the rows that still have a label; without labels it is empty.
    """
    if cond is None or "label" not in cond:
        return cond, torch.zeros(n, dtype=torch.bool, device=rng.device)
    kept = torch.rand(n, generator=rng, device=rng.device) >= probability
    label = torch.where(kept, cond["label"], NULL_LABEL)
    return {**cond, "label": label}, kept & (label != NULL_LABEL)


def unlabelled(cond: Cond | None) -> dict[str, Tensor]:
    """The same conditioning without labels, and so of scale 1; ValueError if there were none."""
    if cond is None or "label" not in cond:
        raise ValueError(
            "guidance needs a data set with labels, and this one has none; "
            "choose another data set or switch the objective's guidance off"
        )
    without = {**cond, "label": torch.full_like(cond["label"], NULL_LABEL)}
    if "guidance" in cond:
        without["guidance"] = _everywhere(torch.ones_like(cond["guidance"][:, 0]))
    return without


def velocity_at(net: Network, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    """v(x, t) of a network: its "v" output, else its average velocity at r = t."""
    return velocity_of(net(x, t, t, on_diagonal(cond, t)))


def velocity_of(out: Mapping[str, Tensor]) -> Tensor:
    """The velocity among the outputs of a call with r = t."""
    return out["v"] if "v" in out else out["u"]


def guidance_direction(
    net: Network, x: Tensor, t: Tensor, cond: Cond | None, with_label: Tensor | None = None
) -> Tensor:
    """v(x, t, y) - v(x, t, null); v(x, t, y) may be given, if it is known."""
    v = velocity_at(net, x, t, cond) if with_label is None else with_label
    return v - velocity_at(net, x, t, unlabelled(cond))


def guided_velocity(
    net: Network, x: Tensor, t: Tensor, cond: Cond | None, scale: float, limit: float = math.inf
) -> Tensor:
    """v(y) + (scale - 1) dv, dv = v(y) - v(null) with a root mean square of at most `limit`."""
    v = velocity_at(net, x, t, cond)
    if scale == 1:
        return v
    return v + (scale - 1) * limit_norm(v - velocity_at(net, x, t, unlabelled(cond)), limit)


def guided_target(
    v_c: Tensor,
    net: Network,
    x: Tensor,
    t: Tensor,
    cond: Cond | None,
    rows: Tensor,
    share: float | Tensor,
    limit: float = math.inf,
    with_label: Tensor | None = None,
) -> Tensor:
    """v_c + share (v(y) - v(null)) on the rows of the mask `rows` [b], and v_c on the others.

    v(y) may be given `with_label`, if it is known.
    """
    if isinstance(share, Tensor):
        share = like(share, x)
    elif share == 0:
        return v_c
    dv = limit_norm(guidance_direction(net, x, t, cond, with_label), limit)
    return torch.where(like(rows, x), v_c + share * dv, v_c)


@guidance_laws.register("log_uniform_guidance")
@dataclass(frozen=True, kw_only=True)
class LogUniformGuidance:
    """Scales in [1, largest] with a uniform logarithm, and intervals around the middle of time."""

    reference: ClassVar = IMPROVED_MEAN_FLOW

    largest: float = 8.0
    low: tuple[float, float] = (0.0, 0.5)
    high: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        check_interval("log_uniform_guidance.low", self.low)
        check_interval("log_uniform_guidance.high", self.high)
        if self.largest < 1 or self.low[1] > self.high[0]:
            raise ValueError(
                "log_uniform_guidance needs largest >= 1 and low[1] <= high[0]; given are largest "
                f"= {self.largest!r}, low = {self.low!r} and high = {self.high!r}"
            )

    def __call__(self, n: int, rng: torch.Generator) -> Tensor:
        shares = torch.rand(3, n, generator=rng, device=rng.device)
        low, high = (
            start + (end - start) * share
            for (start, end), share in zip((self.low, self.high), shares[1:], strict=True)
        )
        return torch.stack([self.largest ** shares[0], low, high], dim=1)


@guidance_laws.register("uniform_guidance")
@dataclass(frozen=True, kw_only=True)
class UniformGuidance:
    """Scales that are uniform in [smallest, largest], at all times; one scale if both are equal."""

    reference: ClassVar = TERMINAL_VELOCITY

    smallest: float = 1.0
    largest: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest:
            raise ValueError(
                "uniform_guidance needs 1 <= smallest <= largest; given are smallest = "
                f"{self.smallest!r} and largest = {self.largest!r}"
            )

    def __call__(self, n: int, rng: torch.Generator) -> Tensor:
        share = torch.rand(n, generator=rng, device=rng.device)
        return _everywhere(self.smallest + (self.largest - self.smallest) * share)


def with_guidance(
    cond: Cond | None, law: GuidanceLaw, diagonal: Tensor, rng: torch.Generator
) -> dict[str, Tensor]:
    """The conditioning with a draw of guidance for each row.

    Rows of the mask `diagonal` [b] have the whole interval, [0, 1].
    """
    drawn = law(len(diagonal), rng)
    told = torch.where(diagonal[:, None], _everywhere(drawn[:, 0]), drawn)
    return {**(cond or {}), "guidance": told}


def on_diagonal(cond: Cond | None, t: Tensor) -> Cond | None:
    """The conditioning of a question at r = t: the same guidance, told over the whole interval.

    The scale is the row's own where t lies inside the row's interval, and 1 where it does not.
    """
    if cond is None or "guidance" not in cond:
        return cond
    scale = cond["guidance"][:, 0]
    return {**cond, "guidance": _everywhere(torch.where(_in_own_interval(cond, t), scale, 1))}


def told_scale(cond: Cond | None) -> Tensor:
    """The scale that each row is told, [b]; one 1 for all rows where no guidance was drawn."""
    if cond is None or "guidance" not in cond:
        return torch.ones(1)
    return cond["guidance"][:, 0]


def unguided(cond: Cond | None, rows: Tensor) -> Cond | None:
    """The same conditioning, with a scale of 1 at all times on the rows of the mask [b]."""
    if cond is None or "guidance" not in cond:
        return cond
    given = cond["guidance"]
    plain = _everywhere(torch.ones_like(given[:, 0]))
    return {**cond, "guidance": torch.where(rows[:, None], plain, given)}


def guidance_share(cond: Cond | None, t: Tensor) -> Tensor:
    """The share a of each row, [b]: 1 - 1/w inside the row's interval, 0 outside."""
    assert cond is not None, "no guidance was drawn"
    return torch.where(_in_own_interval(cond, t), 1 - 1 / cond["guidance"][:, 0], 0)


def _in_own_interval(cond: Cond, t: Tensor) -> Tensor:
    """The mask [b] of the rows whose time lies in the interval of their guidance."""
    _, low, high = cond["guidance"].unbind(1)
    return (low <= t) & (t <= high)


def _everywhere(scale: Tensor) -> Tensor:
    """Guidance [b 3] of these scales [b] at all times."""
    return torch.stack([scale, torch.zeros_like(scale), torch.ones_like(scale)], dim=1)


def limit_norm(direction: Tensor, bound: float) -> Tensor:
    """direction [b *d], with each row scaled down to a root mean square of at most `bound`."""
    size = rms(direction).clamp_min(torch.finfo(direction.dtype).tiny)
    return direction * like((bound / size).clamp_max(1), direction)


def inside(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """The mask [b] of the times that lie in a closed interval."""
    return (interval[0] <= t) & (t <= interval[1])


def check_interval(name: str, interval: tuple[float, float]) -> None:
    if not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise ValueError(f"{name} = {interval!r} must be (low, high) with 0 <= low <= high <= 1")
