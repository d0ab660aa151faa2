"""A mistake whose effect shrinks with a method's step is as large beside it at every stage.

The objectives compare two points at a small distance, as consistency models do. What pulls an error
of both back is as small as the step, and so is the effect of a mistake.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.expected import moments
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import GAUSSIAN, STEPS, Subject
from registry import objectives
from registry.protocols import LossOutput, Teacher
from zoo.ops import like, mean_flat, normal_like
from zoo.teachers import EmaTeacher, Online


def at_gaussian(make):
    return run_claim("fixed point", fixed_point.at_gaussian, Subject("mine", make))


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """ECT, written with u(x, t, 0): D(x, t) = x - t u, and a step that halves at each stage."""

    heads: ClassVar = ("u",)
    trains: ClassVar = ("map_to_data",)

    first_stage: int = 0
    teacher: Teacher = field(default_factory=Online)

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t = torch.rand(len(x0), generator=rng) * 0.98 + 0.01
        s = t * (1 - 2.0 ** -(self.first_stage + 1 + batch.step // 5_000))
        target = self.denoised(self.teacher(net), x0, x1, s, t, batch.cond)
        error = self.denoised(net, x0, x1, t, t, batch.cond) - target.detach()
        return LossOutput(per_sample=mean_flat(error**2) / (t - s), t=t, r=0 * t)

    def denoised(self, net, x0, x1, time, t, cond):
        x = x0 + like(time, x0) * (x1 - x0)
        return x - like(time, x0) * net(x, time, 0 * time, cond)["u"]


class LateTarget(Consistency):
    """The target is told the time of the prediction."""

    def denoised(self, net, x0, x1, time, t, cond):
        x = x0 + like(time, x0) * (x1 - x0)
        return x - like(time, x0) * net(x, t, 0 * t, cond)["u"]


@dataclass(frozen=True, kw_only=True)
class AlphaFlow:
    """A step of size alpha along the conditional velocity, and the network from there on."""

    heads: ClassVar = ("u",)

    alpha: float = 1e-3

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t, r = torch.rand(2, len(x0), generator=rng).sort(0, descending=True).values
        s = t - self.alpha * (t - r)
        x, v = x0 + like(t, x0) * (x1 - x0), x1 - x0
        with torch.no_grad():
            after = self.after(net, x, x - like(t - s, x0) * v, t, s, r, batch.cond)
        target = self.alpha * v + (1 - self.alpha) * after
        return LossOutput(per_sample=mean_flat((net(x, t, r, batch.cond)["u"] - target) ** 2))

    def after(self, net, x, z, t, s, r, cond):
        return net(z, s, r, cond)["u"]


class AlphaFlowLate(AlphaFlow):
    """The step is taken, but time stands still."""

    def after(self, net, x, z, t, s, r, cond):
        return net(z, t, r, cond)["u"]


class AlphaFlowUnmoved(AlphaFlow):
    """Time goes on, but the state does not."""

    def after(self, net, x, z, t, s, r, cond):
        return net(x, s, r, cond)["u"]


@dataclass(frozen=True, kw_only=True)
class Solution(AlphaFlow):
    """SoFlow: u times the difference quotient of X(x, t, r) between two times, without gradient."""

    sign: int = -1

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t, r = torch.rand(2, len(x0), generator=rng).sort(0, descending=True).values
        step = self.alpha * (t - r).clamp_min(1e-3)
        x, v, s = x0 + like(t, x0) * (x1 - x0), x1 - x0, t - step
        z, u = x - like(step, x0) * v, net(x, t, r, batch.cond)["u"]
        with torch.no_grad():
            end = z - like(s - r, x0) * self.after(net, x, z, t, s, r, batch.cond)
        quotient = (x - like(t - r, x0) * u.detach() - end) / like(step, x0)
        return LossOutput(per_sample=self.sign * mean_flat(u * quotient))


class SolutionLate(Solution):
    def after(self, net, x, z, t, s, r, cond):
        return net(z, t, r, cond)["u"]


@pytest.mark.parametrize("make", [lambda: Consistency(first_stage=9), AlphaFlow, Solution])
def test_a_small_step_in_the_right_direction_passes(make):
    result = at_gaussian(make)
    assert result.status == "ok", result.reason


@pytest.mark.parametrize("stage", [3, 8, 12])
def test_a_target_at_the_wrong_time_is_rejected_at_every_stage(stage):
    result = at_gaussian(lambda: LateTarget(first_stage=stage))
    assert result.status == "FAIL"
    assert result.value > 2 * fixed_point.LIMIT


def test_every_stage_of_one_schedule_is_weighed():
    """The mistake is made at the last of STEPS alone, where the step is smallest."""

    class AtLast(Consistency):
        def loss(self, net, batch, rng):
            wrong = LateTarget(first_stage=self.first_stage)
            return Consistency.loss(wrong if batch.step == STEPS[-1] else self, net, batch, rng)

    result = at_gaussian(lambda: AtLast(first_stage=9))
    assert result.status == "FAIL"
    assert f"at step {STEPS[-1]}" in result.reason


@pytest.mark.parametrize(
    "make", [AlphaFlowLate, AlphaFlowUnmoved, SolutionLate, lambda: Solution(sign=1)]
)
def test_a_wrong_step_is_rejected_however_small(make):
    assert "FAIL" in {
        at_gaussian(make).status,
        run_claim("pulled back", fixed_point.pulled_back, Subject("mine", make)).status,
    }


def slope(subject, **how):
    return moments._rise(subject, GAUSSIAN, "u", 0, True, **how)["all rows"]


@pytest.mark.parametrize("teacher", [Online, EmaTeacher])
def test_an_error_in_all_calls_is_pulled_back_by_the_step(teacher):
    """2 t (D(x_t) - D(x_s)) / (t - s): 2 t^2 / (t - s) for an exact target, and 2 t for its own."""
    subject = Subject("mine", lambda: Consistency(first_stage=9, teacher=teacher()))
    assert slope(subject, everywhere=True) == pytest.approx(1, rel=0.05)  # 2 E[t]
    assert slope(subject, everywhere=False) == pytest.approx(2**10, rel=0.05)  # 2 E[t] t / (t - s)


@pytest.mark.parametrize("name", ["mean_flow", "improved_mean_flow", "shortcut", "dumo", "decm"])
def test_methods_with_an_anchor_keep_most_of_the_slope(name):
    subject = Subject(name, objectives.get(name))
    assert 0.7 < slope(subject, everywhere=True) / slope(subject, everywhere=False) < 1.01


def test_a_distilled_teacher_has_no_error_of_the_network():
    """Else a loss that regresses the teacher's velocity would pull nothing back."""
    from zoo.objectives.decm import DECM
    from zoo.teachers import Frozen

    subject = Subject("decm", lambda: DECM(teacher=Frozen()))
    assert slope(subject, everywhere=True) > 1


def test_a_slope_that_pulls_nothing_back_is_that_for_exact_targets(monkeypatch):
    """As of rows whose targets are other rows."""
    rises = {True: {"all rows": 2.0, "few rows": -0.1}, False: {"all rows": 3.0, "few rows": 2.5}}
    monkeypatch.setattr(moments, "_rise", lambda *_, everywhere: rises[everywhere])
    assert moments._slopes(None, None, "u", 0, True) == {"all rows": 2.0, "few rows": 2.5}


@dataclass(frozen=True, kw_only=True)
class Tangent:
    """FACM and sCM: a step against a residual, from a value of u that another call has given."""

    heads: ClassVar = ("u",)
    trains: ClassVar = ("map_to_data", "velocity")

    sign: int = -1

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t = torch.rand(len(x0), generator=rng)
        x, zero = x0 + like(t, x0) * (x1 - x0), torch.zeros_like(t)
        velocity = net(x, t, t, batch.cond)["u"]

        def u(x, t):
            return net(x, t, zero, batch.cond)["u"]

        with torch.no_grad():
            v = velocity.detach()
            value, change = torch.func.jvp(u, (x, t), (v, torch.ones_like(t)))
            target = value + self.sign * 0.5 * (value - v + like(t, x0) * change)
        error = (u(x, t) - target) ** 2 + (velocity - (x1 - x0)) ** 2
        return LossOutput(per_sample=mean_flat(error))


def test_a_value_of_another_call_at_the_same_point_is_no_target():
    """It has the same error, so that the sign of the residual decides."""
    subjects = Subject("mine", Tangent), Subject("mine", lambda: Tangent(sign=1))
    right, wrong = (run_claim("pulled", fixed_point.pulled_back, subject) for subject in subjects)
    assert right.status == "ok", right.reason
    assert wrong.status == "FAIL"
    assert "an error of 0.1 in 'u' at r < t" in wrong.reason
