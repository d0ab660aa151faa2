"""`check` on samplers: right ones pass, and each claim rejects a wrong one first."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from part_cases import by_claim, checked, described, first_failure

from benchmarks.conformance.mutations import Recombined
from benchmarks.conformance.parts.sampler import CLAIMS
from registry import samplers
from registry.protocols import Path
from zoo.guidance import unlabelled, velocity_at, velocity_of
from zoo.ops import normal_like
from zoo.paths import Linear
from zoo.samplers import Euler, FlowMap, Heun, Restart, even_times, jump
from zoo.samplers.methods import check_nfe


def full(x, t):
    return torch.full((len(x),), t, dtype=x.dtype)


@dataclass(frozen=True, kw_only=True)
class Multistep:
    """Right: Adams and Bashforth's second order, uneven steps, one evaluation a step."""

    needs: ClassVar = ("velocity",)
    nfe: int = 20

    def __post_init__(self):
        check_nfe("mine", self.nfe)

    def __call__(self, net, x1, cond, rng):
        x, before, last = x1, None, 1.0
        for t, r in pairwise([s**1.5 for s in even_times(self.nfe)]):
            v = velocity_at(net, x, full(x, t), cond)
            ahead = v if before is None else v + (v - before) * (t - r) / (last - t) / 2
            x, before, last = x - (t - r) * ahead, v, t
        return x


@dataclass(frozen=True, kw_only=True)
class Midpoint:
    """Right: two evaluations a step, so that an odd number is refused."""

    needs: ClassVar = ("velocity",)
    nfe: int = 50

    def __post_init__(self):
        check_nfe("mine", self.nfe)
        if self.nfe % 2:
            raise ValueError(f"mine.nfe = {self.nfe} must be even")

    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in pairwise(even_times(self.nfe // 2)):
            m = (t + r) / 2
            half = x - (t - m) * velocity_at(net, x, full(x, t), cond)
            x = x - (t - r) * velocity_at(net, half, full(x, m), cond)
        return x


@dataclass(frozen=True, kw_only=True)
class Diffusing:
    """Right: Euler and Maruyama on the reverse equation with the score of the velocity."""

    needs: ClassVar = ("velocity",)
    nfe: int = 50
    noise: float = 0.5
    gain: ClassVar = 1.0  # of the fresh noise

    def __post_init__(self):
        check_nfe("mine", self.nfe)

    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in pairwise(even_times(self.nfe)):
            v = velocity_at(net, x, full(x, t), cond)
            score, rate = -(x + (1 - t) * v) / t, self.noise * t
            x = x - (t - r) * (v - rate * score / 2)
            if r > 0:
                x = x + self.gain * (rate * (t - r)) ** 0.5 * normal_like(x, rng)
        return x


@dataclass(frozen=True, kw_only=True)
class Guided:
    """Right: guidance of its own, a call of twice the rows in each step."""

    needs: ClassVar = ("velocity",)
    nfe: int = 10
    scale: float = 1.0

    def __post_init__(self):
        check_nfe("mine", self.nfe)

    @property
    def guidance_scale(self):
        return self.scale

    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in pairwise(even_times(self.nfe)):
            if self.scale == 1:
                v = velocity_at(net, x, full(x, t), cond)
            else:
                both = {k: torch.cat([value, unlabelled(cond)[k]]) for k, value in cond.items()}
                twice = torch.cat([x, x])
                v, null = velocity_at(net, twice, full(twice, t), both).chunk(2)
                v = self.combined(v, null)
            x = x - (t - r) * v
        return x

    def combined(self, v, null):
        return null + self.scale * (v - null)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Right: steps of the map on a grid that is finer near the data."""

    needs: ClassVar = ("map",)
    nfe: int = 4
    path: Path = field(default_factory=Linear)

    def __post_init__(self):
        check_nfe("mine", self.nfe)

    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in pairwise([s**2 for s in even_times(self.nfe)]):
            x = jump(net, x, t, r, cond)
        return x


class Straight(Euler):
    """Right by itself: Euler's steps, whose velocity the wrong ones take elsewhere."""

    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in pairwise(even_times(self.nfe)):
            x = x - (t - r) * self.velocity(net, x, t, r, cond, x1)
        return x

    def velocity(self, net, x, t, r, cond, x1):
        return velocity_at(net, x, full(x, t), cond)


class Renoised(Restart):
    """Right by itself: jumps to the data and noise, which the wrong ones add in another way."""

    def __call__(self, net, x1, cond, rng):
        x = jump(net, x1, 1.0, 0.0, cond)
        for t in self.times()[1:]:
            x = jump(net, self.noisy(x, t, rng), t, 0.0, cond)
        return x

    def noisy(self, x, t, rng):
        return (self.path or Linear()).sample(x, normal_like(x, rng), full(x, t)).x_t


class Unmarked(Euler):
    def __post_init__(self):
        pass


class Rounded(Euler):
    """An odd number of evaluations becomes an even one in silence."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "nfe", self.nfe + self.nfe % 2)


class Single(FlowMap):
    def __call__(self, net, x1, cond, rng):
        return super().__call__(net, x1, cond, rng).float()


class OnlyU(Straight):
    def velocity(self, net, x, t, r, cond, x1):
        return net(x, full(x, t), full(x, t), cond)["u"]


class Denoising(Euler):
    """One more evaluation at the end."""

    def __call__(self, net, x1, cond, rng):
        x = super().__call__(net, x1, cond, rng)
        return x - 0 * velocity_at(net, x, full(x, 0.0), cond)


class TwoForOne(Heun):
    """nfe is the number of steps, each of which makes two calls."""

    def __call__(self, net, x1, cond, rng):
        return Heun(nfe=2 * self.nfe)(net, x1, cond, rng)


class Scalars(FlowMap):
    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in pairwise(even_times(self.nfe)):
            one = torch.ones((), dtype=x.dtype)
            x = x - (t - r) * net(x, (t * one)[None], (r * one)[None], cond)["u"]
        return x


class Later(FlowMap):
    """Each step is taken from the noisy end of the one before it."""

    def __call__(self, net, x1, cond, rng):
        x, gap = x1, 1 / self.nfe
        for i in range(self.nfe):
            t = 1 + gap - i * gap
            x = x - gap * net(x, full(x, t), full(x, t - gap), cond)["u"]
        return x


class Quadratic(FlowMap):
    """It steps off the even grid."""

    __call__ = Steps.__call__


class ToTheData(Straight):
    """It asks for the velocity at r = 0."""

    def velocity(self, net, x, t, r, cond, x1):
        return velocity_of(net(x, full(x, t), full(x, 0.0), cond))


class Unconditional(Euler):
    def __call__(self, net, x1, cond, rng):
        return super().__call__(net, x1, None, rng)


class LabelsAlone(Euler):
    def __call__(self, net, x1, cond, rng):
        return super().__call__(net, x1, cond and {"label": cond["label"]}, rng)


class FirstCallAlone(FlowMap):
    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in pairwise(even_times(self.nfe)):
            x, cond = jump(net, x, t, r, cond), None
        return x


class GuidedTooFar(Guided):
    """A scale of 1 would already guide."""

    def combined(self, v, null):
        return v + self.scale * (v - null)


class GuidedAway(Guided):
    def combined(self, v, null):
        return v + self.scale * (null - v)


class GlobalNoise(Renoised):
    def noisy(self, x, t, rng):
        return (self.path or Linear()).sample(x, torch.randn_like(x), full(x, t)).x_t


class Whitening(FlowMap):
    """The noise is given the mean 0."""

    def __call__(self, net, x1, cond, rng):
        return super().__call__(net, x1 - x1.mean(0), cond, rng)


class InPlace(FlowMap):
    def __call__(self, net, x1, cond, rng):
        samples = super().__call__(net, x1, cond, rng)
        x1 += 1
        return samples


class Stopping(Euler):
    """The last of nfe + 1 steps is missing."""

    def __call__(self, net, x1, cond, rng):
        x = x1
        for t, r in list(pairwise(even_times(self.nfe + 1)))[:-1]:
            x = x - (t - r) * velocity_at(net, x, full(x, t), cond)
        return x


class FalseTimes(Straight):
    """Each step asks for the velocity at the time 1 - t."""

    def velocity(self, net, x, t, r, cond, x1):
        return velocity_at(net, x, full(x, 1 - t), cond)


class FirstState(Straight):
    """Every step asks for the velocity at the noise."""

    def velocity(self, net, x, t, r, cond, x1):
        return velocity_at(net, x1, full(x, t), cond)


class EndTimes(Straight):
    """Each step asks for the velocity at the time where it ends."""

    def velocity(self, net, x, t, r, cond, x1):
        return velocity_at(net, x, full(x, r), cond)


class Clipped(Straight):
    """No velocity is larger than 1.5."""

    def velocity(self, net, x, t, r, cond, x1):
        return velocity_at(net, x, full(x, t), cond).clamp(-1.5, 1.5)


class StraightNoise(Renoised):
    """Noise is added along the straight path, whatever the path is."""

    def noisy(self, x, t, rng):
        return (1 - t) * x + t * normal_like(x, rng)


class Loud(Diffusing):
    """The noise of each step is a third too large."""

    gain = 1.33


EVALUATIONS = "takes the evaluations that it can have"
SHAPES = "shapes and dtypes"
CALLS = "makes as many calls as nfe"
TIMES = "calls what it needs, in 0 <= r <= t <= 1"
GUIDANCE = "guidance is null + scale (given - null)"
LINES = "straight lines are exact"
LAW = "keeps the law of the data"
WRONG = [
    (Unmarked, EVALUATIONS, "it takes nfe = 0", "ValueError"),
    (Rounded, EVALUATIONS, "nfe = 1 is given and 2 is kept", "what the user asks for"),
    (Single, SHAPES, "torch.float32, not torch.float64", "dtype"),
    (OnlyU, SHAPES, "reads the output 'u' of a network that makes v", "velocity_at"),
    (Denoising, CALLS, "nfe = 1 makes 2 calls", "not of steps"),
    (TwoForOne, CALLS, "nfe = 1 makes 2 calls", "not of steps"),
    (Scalars, SHAPES, "t [1], r [1]", "for each row"),
    (Later, TIMES, "at t = 2, r = 1", "noisier time"),
    (Quadratic, TIMES, "and it needs even_steps", "`needs`"),
    (ToTheData, TIMES, "at t = 1, r = 0, and it needs velocity", "`needs`"),
    (Unconditional, "conditions reach every call", "'label' does not reach", "pass cond on"),
    (LabelsAlone, "conditions reach every call", "'other' does not reach", "pass cond on"),
    (FirstCallAlone, "conditions reach every call", "nfe = 2", "pass cond on"),
    (GuidedTooFar, GUIDANCE, "not those of null + 2 (given - null)", "scale * (given - null)"),
    (GuidedAway, GUIDANCE, "not those of null + 2 (given - null)", "scale * (given - null)"),
    (GlobalNoise, "determined by noise and rng", "noise and rng differ", "generator=rng"),
    (InPlace, "determined by noise and rng", "changes the noise x1 in place", "x = x * a"),
    (Whitening, "rows are independent", "noise of the others", "no mean"),
    (Stopping, LINES, "goes 0.5 of the way", "add up to 1"),
    (FalseTimes, LINES, "at t = 0 about the state", "belong together"),
    (FirstState, LINES, "reaches at t = 1", "belong together"),
    (EndTimes, LINES, "with nfe = 1 it asks at t = 0", "the noise and t = 1"),
    (Clipped, LAW, "with nfe = 256", "where it starts"),
    (Recombined, LAW, "do not have the data's law", "fresh noise"),
    (StraightNoise, LAW, "do not have the data's law", "along the path"),
    (Loud, LAW, "do not have the data's law", "fresh noise"),
]  # fmt: skip


@pytest.mark.parametrize("name", samplers.names())
def test_registered_sampler_passes(name):
    assert not described(by_claim(samplers, name))


@pytest.mark.parametrize("cls", [Multistep, Midpoint, Diffusing, Guided, Steps, Straight, Renoised])
def test_right_sampler_passes(cls):
    assert not described(checked(samplers, cls))


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG)
def test_wrong_sampler_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(samplers, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason
    assert hint in failure.hint


def test_every_claim_rejects_a_wrong_sampler_first():
    assert {claim for _, claim, *_ in WRONG} == set(CLAIMS)
