"""Claims weigh each kind of rows alone, so that a mistake in few rows does not pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.expected import moments
from benchmarks.conformance.expected.kinds import ALL, losses_by_kind
from benchmarks.conformance.mutations import MUTATIONS
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from registry.protocols import LossOutput
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.shortcut import Shortcut
from zoo.ops import like
from zoo.times import LogitNormalPair


def at_gaussian(make):
    subject = make if isinstance(make, Subject) else Subject("mine", make)
    return run_claim("fixed point", fixed_point.at_gaussian, subject)


def pulled(make):
    return run_claim("pulled back", fixed_point.pulled_back, Subject("mine", make))


def planted(name, make):
    (mutation,) = [one for one in MUTATIONS if one.name == name]
    return mutation.plant(Subject("mine", make))


@dataclass(frozen=True, kw_only=True)
class Unmoved(Shortcut):
    """The second half starts where the first did."""

    def _two_halves(self, teacher, x, t, r, cond, labelled):
        m = (t + r) / 2
        return (teacher(x, t, m, cond)["u"] + teacher(x, m, r, cond)["u"]) / 2


@dataclass(frozen=True, kw_only=True)
class OneHalf(Shortcut):
    """The first half alone is the target."""

    def _two_halves(self, teacher, x, t, r, cond, labelled):
        return teacher(x, t, (t + r) / 2, cond)["u"]


@dataclass(frozen=True, kw_only=True)
class TooFar(Shortcut):
    """The state moves by the whole step where it should move by a half."""

    def _two_halves(self, teacher, x, t, r, cond, labelled):
        m = (t + r) / 2
        u1 = teacher(x, t, m, cond)["u"]
        return (u1 + teacher(x - like(t - r, x) * u1, m, r, cond)["u"]) / 2


@dataclass(frozen=True, kw_only=True)
class Away(Shortcut):
    """The rows of two halves are pushed away from their target."""

    def loss(self, net, batch, rng):
        out = super().loss(net, batch, rng)
        assert out.t is not None
        assert out.r is not None
        sign = torch.where(out.t - out.r > 1.5 / self.num_steps, -1.0, 1.0)
        return replace(out, per_sample=sign * out.per_sample)


def test_shortcut_passes():
    assert at_gaussian(Shortcut).status == "ok"
    assert pulled(Shortcut).status == "ok"


@pytest.mark.parametrize("make", [Unmoved, OneHalf, TooFar])
def test_a_mistake_in_the_rows_of_two_halves_is_rejected_in_them(make):
    result = at_gaussian(make)
    assert result.status == "FAIL"
    assert "in rows with t - r >= 0.05" in result.reason


def test_a_second_half_at_the_time_of_the_first_is_rejected():
    result = at_gaussian(planted("later steps of a teacher at its first t", Shortcut))
    assert result.status == "FAIL"
    assert "in rows with t - r >= 0.05" in result.reason


def test_few_rows_that_are_pushed_away_are_found():
    result = pulled(Away)
    assert result.status == "FAIL"
    assert "not pushed back" in result.reason
    assert "rows with t - r >= 0.05" in result.reason


def test_all_rows_together_would_have_let_it_pass(monkeypatch):
    def together(out):
        yield ALL, out.per_sample.mean()

    monkeypatch.setattr(moments, "losses_by_kind", together)
    later = planted("later steps of a teacher at its first t", Shortcut)
    assert at_gaussian(later).status == "ok"
    assert pulled(Away).status == "ok"


@pytest.mark.slow
def test_one_row_in_twenty_of_mean_flow_is_weighed():
    def few():
        return MeanFlow(times=LogitNormalPair(off_diagonal_fraction=0.05))

    assert at_gaussian(few).status == "ok"
    wrong = planted("tangents (v, 0, 0)", few)
    result = at_gaussian(wrong)
    assert result.status == "FAIL"
    assert "t - r >= 0.05" in result.reason


def test_kinds_are_told_by_the_length_of_the_step():
    t = torch.full((40,), 0.8)
    r = torch.cat([t[:10], t[:10] - 0.01, t[:17] - 0.3, t[:3] - 0.3])
    losses = torch.arange(40.0)
    found = dict(losses_by_kind(LossOutput(per_sample=losses, t=t, r=r)))
    assert {name: float(value) for name, value in found.items()} == {
        ALL: 19.5,
        "rows with r = t": 4.5,
        "rows with 0 < t - r < 0.05": 14.5,
        "rows with t - r >= 0.05": 29.5,
    }
    assert [*dict(losses_by_kind(LossOutput(per_sample=losses)))] == [ALL]
    assert [*dict(losses_by_kind(LossOutput(per_sample=losses, t=t, r=t)))] == [ALL]
    few = LossOutput(per_sample=losses, t=t, r=torch.where(torch.arange(40) < 7, t - 0.5, t))
    assert [*dict(losses_by_kind(few))] == [ALL, "rows with r = t"]
