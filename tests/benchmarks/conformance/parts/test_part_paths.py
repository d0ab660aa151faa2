"""`check` on paths: right ones pass, and each claim rejects a path that breaks it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from part_cases import by_claim, checked, described, first_failure

from benchmarks.conformance import fixed_point
from benchmarks.conformance.networks import OnPath, slope
from benchmarks.conformance.parts.path import CLAIMS
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import GAUSSIAN, Subject
from registry import paths
from registry.protocols import PathSample
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import like
from zoo.paths import AffinePath, Linear, TrigFlow

F64 = torch.float64


class Smoothstep(AffinePath):
    """It stands still at both ends, where no velocity tells data from noise."""

    def alpha(self, t):
        return 1 - self.sigma(t)

    def sigma(self, t):
        return 3 * t**2 - 2 * t**3

    def d_alpha(self, t):
        return -self.d_sigma(t)

    def d_sigma(self, t):
        return 6 * t - 6 * t**2


class Uneven(AffinePath):
    """Data fade with the power 3/2 and noise grows with an exponential."""

    def alpha(self, t):
        return (1 - t) ** 1.5

    def sigma(self, t):
        return torch.expm1(2 * t) / math.expm1(2)

    def d_alpha(self, t):
        return -1.5 * (1 - t) ** 0.5

    def d_sigma(self, t):
        return 2 * torch.exp(2 * t) / math.expm1(2)


class ByHand:
    """A straight path without any of the zoo."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return 1 * t

    def d_alpha(self, t):
        return t * 0 - 1

    def d_sigma(self, t):
        return t * 0 + 1

    def sample(self, x0, x1, t):
        time = t.reshape(-1, *[1] * (x0.dim() - 1))
        return PathSample(x0 + time * (x1 - x0), x1 - x0)

    def to_x0(self, x_t, velocity, t):
        return x_t - t.reshape(-1, *[1] * (x_t.dim() - 1)) * velocity

    def to_x1(self, x_t, velocity, t):
        return x_t + (1 - t.reshape(-1, *[1] * (x_t.dim() - 1))) * velocity

    def to_velocity(self, x0, x1, t):
        return x1 - x0


class OneShape(Linear):
    def sample(self, x0, x1, t):
        return PathSample((1 - t[:, None]) * x0 + t[:, None] * x1, x1 - x0)


class SinglePrecision(Linear):
    def to_x0(self, x_t, velocity, t):
        return super().to_x0(x_t, velocity, t).float()


class LoudNoise(AffinePath):
    """The noise ends with a standard deviation of 2."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return 2 * t

    def d_alpha(self, t):
        return -torch.ones_like(t)

    def d_sigma(self, t):
        return 2 * torch.ones_like(t)


class Turning(AffinePath):
    """The noise grows, shrinks and grows again."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t + 0.3 * torch.sin(2 * math.pi * t)

    def d_alpha(self, t):
        return -torch.ones_like(t)

    def d_sigma(self, t):
        return 1 + 0.6 * math.pi * torch.cos(2 * math.pi * t)


class StraightPoints(TrigFlow):
    """Points of the straight path under the coefficients of the circle."""

    def sample(self, x0, x1, t):
        return PathSample((1 - like(t, x0)) * x0 + like(t, x0) * x1, self.to_velocity(x0, x1, t))


class SlowData(TrigFlow):
    """d_alpha is a tenth too small."""

    def d_alpha(self, t):
        return 0.9 * super().d_alpha(t)


class SlowAtOneEnd(Linear):
    """d_sigma is wrong at t = 1 alone, where samplers start."""

    def d_sigma(self, t):
        return torch.where(t > 0.999, 0.5, 1.0).to(t.dtype)


class SteepEnd(AffinePath):
    """The variance is kept, and the velocity of the data has no bound at t = 1."""

    def alpha(self, t):
        return (1 - t**2).sqrt()

    def sigma(self, t):
        return 1 * t

    def d_alpha(self, t):
        return -t / (1 - t**2).sqrt()

    def d_sigma(self, t):
        return torch.ones_like(t)


class Backwards(TrigFlow):
    def sample(self, x0, x1, t):
        right = super().sample(x0, x1, t)
        return PathSample(right.x_t, -right.velocity)

    def to_x0(self, x_t, velocity, t):
        return super().to_x0(x_t, -velocity, t)

    def to_x1(self, x_t, velocity, t):
        return super().to_x1(x_t, -velocity, t)


class StraightBack(TrigFlow):
    """The conversion of the straight path on the circle."""

    def to_x1(self, x_t, velocity, t):
        return x_t + (1 - like(t, x_t)) * velocity


class Sorting(Linear):
    """The times are sorted, so that rows get the times of others."""

    def alpha(self, t):
        return 1 - self.sigma(t)

    def sigma(self, t):
        return t.sort().values


class Drawing(Linear):
    def sample(self, x0, x1, t):
        torch.rand(1)
        return super().sample(x0, x1, t)


class InPlace(Linear):
    def sample(self, x0, x1, t):
        sample = super().sample(x0, x1, t)
        x1 += 1e-13
        return sample


WRONG = [
    (OneShape, "shapes and dtypes", "size of tensor", "like(t, x)"),
    (SinglePrecision, "shapes and dtypes", "to_x0 for data [5, 2] of torch.float64", "dtype"),
    (LoudNoise, "x_0 is the data and x_1 the noise", "sigma is 2", "sigma(1) = 1"),
    (Turning, "alpha falls and sigma rises", "sigma does not rise after t = 0.", "sigma rises"),
    (StraightPoints, "x_t is alpha x0 + sigma x1", "does not give alpha x0", "x_t = like("),
    (SlowData, "derivatives of alpha and sigma", "d_alpha is -1.41", "differentiate alpha"),
    (SlowAtOneEnd, "derivatives of alpha and sigma", "d_sigma is 0.5 at t = 1", "sigma(t)"),
    (SteepEnd, "derivatives of alpha and sigma", "d_alpha is not finite at t = 1", "t = 1"),
    (Backwards, "velocity is that of x_t", "sample(...).velocity is not", "d_alpha(t) x0"),
    (StraightBack, "conversions give back the ends", "to_x1 does not give back the noise", "solve"),
    (Sorting, "rows are independent", "other rows", "t.mean()"),
    (Drawing, "draws and changes nothing", "global generator of torch", "rng"),
    (InPlace, "draws and changes nothing", "changes x1 in place", "x = x * a"),
]  # fmt: skip


@pytest.mark.parametrize("name", paths.names())
def test_registered_path_passes(name):
    assert not described(by_claim(paths, name))


@pytest.mark.parametrize("cls", [Smoothstep, Uneven, ByHand])
def test_right_path_passes(cls):
    results = checked(paths, cls)
    assert not described(results)
    stands_still = "stand still" in results["conversions give back the ends"].figure
    assert stands_still == (cls is not ByHand)


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG)
def test_wrong_path_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(paths, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason
    assert hint in failure.hint


def test_every_claim_rejects_a_wrong_path_first():
    assert {claim for _, claim, *_ in WRONG} == set(CLAIMS)


@dataclass(frozen=True, kw_only=True)
class TenthOff(Linear):
    """d_alpha is a tenth too small, and what is made of it too."""

    def d_alpha(self, t):
        return 0.9 * super().d_alpha(t)


@pytest.mark.parametrize(
    ("objective", "path", "right"),
    [
        (FlowMatching, TrigFlow(), True),
        (FlowMatching, TenthOff(), False),
        (FlowMatching, SlowData(), False),
        (MeanFlow, TenthOff(), False),
    ],
)
def test_objective_on_a_path_with_a_wrong_derivative_is_rejected(objective, path, right):
    subject = Subject("mine", lambda: objective(path=path))
    result = run_claim("fixed point", fixed_point.at_gaussian, subject)
    assert (result.status == "ok") == right


@pytest.mark.parametrize("path", [Linear(), TrigFlow()])
def test_solution_on_a_path_has_the_derivatives_that_are_measured(path):
    """The velocity is the derivative of the flow map, which uses no derivative of the path."""
    net, t = OnPath(GAUSSIAN, path), torch.linspace(0.05, 0.95, 7, dtype=F64)
    x, step = torch.randn(7, 2, dtype=F64, generator=torch.Generator().manual_seed(0)), 1e-4
    u = net(x, t, t - step, None)["u"]
    v = net(x - like(t * 0 + step / 2, x) * u, t - step / 2, t - step / 2, None)["v"]
    torch.testing.assert_close(u, v, rtol=0, atol=1e-6)


def test_slope_is_exact_up_to_the_ends_and_can_be_differentiated():
    t = torch.linspace(0, 1, 41, dtype=F64)
    torch.testing.assert_close(slope(torch.sin, t), torch.cos(t), rtol=0, atol=1e-11)
    second = torch.func.jvp(lambda t: slope(torch.sin, t), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(second, -torch.sin(t), rtol=0, atol=1e-7)
    asked = []
    slope(lambda t: asked.append(t) or t, t)
    assert min(float(a.min()) for a in asked) >= -1e-15
    assert max(float(a.max()) for a in asked) <= 1 + 1e-15
