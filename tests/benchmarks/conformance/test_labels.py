"""Every call of the network has the condition of its rows, also targets and teachers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from benchmarks.conformance.claims import labels
from benchmarks.conformance.report import CLAIMS
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from zoo.objectives.self_distillation import SelfDistillation
from zoo.objectives.shortcut import Shortcut
from zoo.objectives.terminal_velocity import TerminalVelocity
from zoo.teachers import EmaTeacher


class UnlabelledMap(SelfDistillation):
    """Rows with r < t are asked and trained without a condition."""

    def residual(self, net, teacher, rows, cond, a):
        return super().residual(net, teacher, rows, None, a)


@dataclass
class Forgetful(EmaTeacher):
    """It asks its network without a condition."""

    def __call__(self, net):
        taught = super().__call__(net)
        return lambda x, t, r, cond: taught(x, t, r, None)


@dataclass
class Relabelling(EmaTeacher):
    """It passes every condition but the label."""

    def __call__(self, net):
        taught = super().__call__(net)
        return lambda x, t, r, cond: taught(
            x, t, r, cond and {name: value for name, value in cond.items() if name != "label"}
        )


def unlabelled_target():
    return TerminalVelocity(teacher=Forgetful(decay=0.99))


def target_without_the_label():
    return TerminalVelocity(teacher=Relabelling(decay=0.99))


PLANTED = (UnlabelledMap, unlabelled_target, target_without_the_label)


@pytest.mark.parametrize("make", PLANTED)
def test_a_call_without_labels_is_rejected(make):
    result = run_claim("labels", labels, Subject("mine", make))
    assert result.status == "FAIL"
    assert "a call of the network has no condition" in result.reason
    assert "batch.cond" in result.hint


@pytest.mark.parametrize("make", [SelfDistillation, TerminalVelocity])
def test_calls_with_labels_pass(make):
    assert run_claim("labels", labels, Subject("mine", make)).status == "ok"


def test_calls_with_all_labels_dropped_pass():
    """Guidance asks for the velocity without a label."""
    subject = Subject("mine", lambda: Shortcut(guidance_scale=1.5), needs_labels=True)
    assert run_claim("labels", labels, subject).status == "ok"


@pytest.mark.slow
def test_no_other_claim_rejects_a_map_without_labels():
    subject = Subject("self_distillation", UnlabelledMap)
    others = {name: claim for name, claim in CLAIMS.items() if name != "labels"}
    assert [n for n, c in others.items() if run_claim(n, c, subject).status == "FAIL"] == []
