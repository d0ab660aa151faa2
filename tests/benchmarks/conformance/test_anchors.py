"""What is learned comes from the data: by an anchor, and from less noisy times to noisier ones."""

from __future__ import annotations

import pytest

from benchmarks.conformance.fixed_point import pulled_back
from benchmarks.conformance.report import CLAIMS
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from zoo.guidance import velocity_at
from zoo.objectives import facm
from zoo.objectives.consistency import Consistency
from zoo.objectives.facm import FACM
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.self_distillation import SelfDistillation
from zoo.objectives.terminal_velocity import TerminalVelocity
from zoo.ops import mean_flat
from zoo.teachers import EmaTeacher
from zoo.times import LogitNormalPair, UniformPair

R_T = "an error of u at r = t changes no gradient"
PUSHED = "an error of 0.1 in 'u' that its targets have too is pushed away"
OTHER = "the exact solution for other data is a fixed point too"


def pulled(make):
    return run_claim("errors are pulled back", pulled_back, Subject("mine", make))


@pytest.fixture
def facm_without_its_anchor(monkeypatch):
    monkeypatch.setattr(facm, "anchor", lambda u, v, cosine_weight: 0 * mean_flat(u))
    return FACM


class AnchoredToItself(TerminalVelocity):
    """The velocity at r = t is held against that of the average, in place of the data's."""

    def _guided(self, teacher, d, rng):
        return velocity_at(teacher, d.x_t, d.t, d.cond)


class LaterTarget(Consistency):
    """The two times of a step are swapped: the target is the noisier one."""

    def pair(self, t, progress):
        t, m = super().pair(t, progress)
        return m, t


def later_target():
    return LaterTarget(gap_power=0.0)  # which would be negative


def later_target_of_an_average():
    return LaterTarget(gap_power=0.0, target=EmaTeacher())


def off_the_diagonal(kind):
    """No row is flow matching: the map agrees with its own velocity, whichever that is."""
    times = UniformPair(off_diagonal_fraction=1.0)
    return lambda: SelfDistillation(kind=kind, times=times)


def test_a_velocity_that_no_row_trains_is_rejected(facm_without_its_anchor):
    result = pulled(facm_without_its_anchor)
    assert result.status == "FAIL"
    assert R_T in result.reason
    assert "train u at r = t" in result.hint


@pytest.mark.parametrize(
    "make", [off_the_diagonal("lsd"), off_the_diagonal("psd"), AnchoredToItself]
)
def test_a_map_that_must_only_agree_with_itself_is_rejected(make):
    result = pulled(make)
    assert result.status == "FAIL"
    assert OTHER in result.reason
    assert "anchor it" in result.hint


@pytest.mark.parametrize("make", [later_target, later_target_of_an_average])
def test_a_target_at_a_later_time_is_rejected(make):
    result = pulled(make)
    assert result.status == "FAIL"
    assert PUSHED in result.reason
    assert "m < t" in result.hint


def test_a_target_at_an_earlier_time_passes():
    assert pulled(lambda: Consistency(gap_power=0.0)).status == "ok"


def test_a_whole_map_of_the_data_needs_no_rows_on_the_diagonal():
    """u(x, t, r) has the velocity as its limit where r tends to t."""
    times = LogitNormalPair(off_diagonal_fraction=1.0)
    assert pulled(lambda: MeanFlow(times=times)).status == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("make", [FACM, SelfDistillation, TerminalVelocity])
def test_anchored_methods_pass(make):
    assert pulled(make).status == "ok"


def rejecting(make):
    subject = Subject("mine", make)
    return [n for n, c in CLAIMS.items() if run_claim(n, c, subject).status == "FAIL"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [off_the_diagonal("lsd"), AnchoredToItself, later_target])
def test_no_other_claim_rejects_it(make):
    assert rejecting(make) == ["errors are pulled back"]


@pytest.mark.slow
def test_no_other_claim_rejects_facm_without_its_anchor(facm_without_its_anchor):
    assert rejecting(facm_without_its_anchor) == ["errors are pulled back"]
