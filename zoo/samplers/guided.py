"""Samplers that run another one, their field `sampler`, with guidance; scale 1 means no guidance.

cfg              u and v <- null + scale (given - null), by two rows of the network per sample
input_guidance   the scale and the interval are inputs of a network that was trained with them
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from registry import samplers
from registry.protocols import Cond, Network, Reference, Sampler
from zoo.guidance import check_interval, inside, unlabelled
from zoo.samplers.methods import Euler, FlowMap, check_nfe


class GuidedSampler:
    """A sampler that runs another one, its field `sampler`, with guidance."""

    needs: ClassVar[tuple[str, ...]] = ()  # the inner sampler says what it needs

    nfe: int
    sampler: Sampler
    scale: float
    interval: tuple[float, float]

    @property
    def guidance_scale(self) -> float:
        return self.scale

    def inner(self) -> Sampler:
        """The other sampler, with the nfe of this one."""
        replace: Any = dataclasses.replace  # a Protocol cannot say "a dataclass"
        return replace(self.sampler, nfe=self.nfe)

    def __post_init__(self) -> None:
        name = samplers.name_of(self)
        check_nfe(name, self.nfe)
        check_interval(f"{name}.interval", self.interval)
        self.inner()


@samplers.register("cfg")
@dataclass(frozen=True, kw_only=True)
class ClassifierFree(GuidedSampler):
    """Classifier-free guidance inside an interval of times: null + scale (given - null).

    Both are rows of one network call, so a call inside the interval costs as much as two calls.
    Samples in fewer evaluations than `least_nfe` are not guided: it is for networks that have
    learned the guidance of long steps, such as Shortcut's, and not that of the shortest.
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
    least_nfe: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nfe("cfg", self.least_nfe, "least_nfe")

    @property
    def guidance_scale(self) -> float:
        return self.scale if self.nfe >= self.least_nfe else 1.0

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        guided = guided_network(net, self.guidance_scale, self.interval)
        return self.inner()(guided, x1, cond, rng)


@samplers.register("input_guidance")
@dataclass(frozen=True, kw_only=True)
class InputGuidance(GuidedSampler):
    """Guidance whose scale and interval are inputs of a network that was trained with them."""

    nfe: int = 1
    sampler: Sampler = field(default_factory=FlowMap)
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale >= 1:
            raise ValueError(
                f"input_guidance.scale = {self.scale!r} must be at least 1; 1 is no guidance"
            )

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        guidance = x1.new_tensor([self.scale, *self.interval]).expand(len(x1), 3)
        return self.inner()(net, x1, {**(cond or {}), "guidance": guidance}, rng)


def guided_network(net: Network, scale: float, interval: tuple[float, float]) -> Network:
    """The network with guided u and v at times inside the interval.

    The times must be the same for all rows, and the condition must have labels (else ValueError).
    """

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
