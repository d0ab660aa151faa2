"""Every branch that `exact_with` names is tested at every stage, and `--set` checks a variant."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from benchmarks.cli import main
from benchmarks.conformance import fixed_point
from benchmarks.conformance.gradients import not_through_targets
from benchmarks.conformance.reached import not_reached
from benchmarks.conformance.report import CLAIMS, check, run, variant
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import STEPS, Subject
from registry import objectives
from registry.protocols import LossOutput
from zoo.ops import like, mean_flat, normal_like


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """alpha-Flow: trajectory flow matching, then small steps, then a derivative."""

    heads: ClassVar = ("u",)
    exact_with: ClassVar = ({"first": 1e-3, "last": 1e-3}, {"first": 0.0, "last": 0.0})

    first: float = 1.0
    last: float = 0.0

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t, r = torch.rand(2, len(x0), generator=rng).sort(0, descending=True).values
        x, v = x0 + like(t, x0) * (x1 - x0), x1 - x0
        alpha = self.first + batch.progress * (self.last - self.first)

        def u(x, t, r):
            return net(x, t, r, batch.cond)["u"]

        with self.without_gradient():
            if alpha:
                s = t - alpha * (t - r)
                target = alpha * v + (1 - alpha) * u(x - like(t - s, x0) * v, s, r)
            else:
                tangents = v, torch.ones_like(t), torch.zeros_like(r)
                target = self.target(v, like(t - r, x0) * torch.func.jvp(u, (x, t, r), tangents)[1])
        return LossOutput(per_sample=mean_flat((u(x, t, r) - target) ** 2), t=t, r=r)

    def target(self, v, change):
        return v - change

    def without_gradient(self):
        return torch.no_grad()


class WrongDerivative(Curriculum):
    """The sign is wrong where alpha is 0, which no step of the defaults but the last comes to."""

    def target(self, v, change):
        return v + change


class LeakingDerivative(Curriculum):
    exact_with: ClassVar = {"first": 0.0, "last": 0.0}

    def without_gradient(self):
        return torch.enable_grad() if self.first == 0 else torch.no_grad()


def result(claim, make):
    return run_claim("", claim, Subject("mine", make))


def test_every_mapping_of_exact_with_is_tested():
    found = result(fixed_point.at_gaussian, Curriculum)
    assert found.status == "ok", found.reason
    assert result(fixed_point.at_gaussian, WrongDerivative).status == "FAIL"

    class FirstAlone(WrongDerivative):
        exact_with: ClassVar = Curriculum.exact_with[0]

    assert result(fixed_point.at_gaussian, FirstAlone).status == "ok"  # the branch is not run


def test_targets_of_every_mapping_are_guarded():
    assert result(not_through_targets, Curriculum).status == "ok"
    assert result(not_through_targets, LeakingDerivative).status == "FAIL"


def test_lines_that_any_mapping_reaches_are_reached():
    @dataclass(frozen=True, kw_only=True)
    class Branches(Curriculum):
        def loss(self, net, batch, rng):
            if self.first == 0:
                return super().loss(net, batch, rng)
            return super().loss(net, batch, rng)

    assert "no run" not in result(not_reached, Branches).figure
    Branches.exact_with = {}
    assert "no run of test_variants.py" in result(not_reached, Branches).figure


def test_stages_are_the_steps_at_which_an_objective_differs():
    assert Subject("mine", Curriculum).stages(exact=False) == STEPS
    assert Subject("mine", Curriculum).stages(exact=True) == STEPS[:1]
    decm = Subject("decm", objectives.get("decm"))
    assert decm.stages(exact=False) == (0, 1, 9_000)  # the last is as the second


@pytest.mark.parametrize(
    "declared", [(), "clip", ({"first": 0.0}, "last"), ({"first": 0.0}, {"fist": 0.0})]
)
def test_exact_with_that_is_no_mapping_of_fields_is_refused(declared):
    class Mine(Curriculum):
        exact_with: ClassVar = declared

    with objectives.temporary("mine_exact_with", Mine):
        with pytest.raises(ValueError, match="exact_with"):
            check("mine_exact_with")


@pytest.mark.parametrize("declared", [{"u": "v"}, {"twin": "v"}, {"w": "velocity"}])
def test_exact_outputs_that_say_nothing_are_refused(declared):
    class Mine(Curriculum):
        heads: ClassVar = ("u", "w")
        exact_outputs: ClassVar = declared

    with objectives.temporary("mine_exact_outputs", Mine):
        with pytest.raises(ValueError, match=r"beside u and v \(w\)"):
            check("mine_exact_outputs")


def command(*arguments):
    return main(["check", *arguments])


@pytest.fixture
def quick(monkeypatch):
    few = {name: CLAIMS[name] for name in ("one loss per row", "labels", "finite")}
    monkeypatch.setattr("benchmarks.conformance.report.claims_for", lambda name: few)


def test_set_checks_a_variant_and_the_report_names_it(quick, capsys):
    assert command("dumo", "--set", "dumo.omega=0.5", "--set", "dumo.direction='guided'") == 0
    printed = capsys.readouterr().out
    assert "dumo with dumo.omega=0.5, dumo.direction='guided' meets 3 claims" in printed
    assert command("dumo", "--set", "dumo.omega = 0.5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["objective"] == "dumo with dumo.omega = 0.5"


def test_a_variant_is_made_of_what_is_bound():
    with variant("dumo", ["dumo.residual = @rcgm()", "rcgm.order = 3"]) as subject:
        assert subject.objective().residual.order == 3
        assert subject.make() is not subject.make()
    assert objectives.get("dumo")().residual.order == 2


def test_a_variant_with_guidance_gets_labels_that_say_nothing():
    """Guidance moves the solution for labels that do; here both velocities of it are one."""
    with variant("dumo", ["dumo.omega = 0.5"]) as subject:
        assert subject.needs_labels
        few = ("one loss per row", "labels", "rows are independent", "fixed point at a Gaussian")
        found = list(run(subject, {name: CLAIMS[name] for name in few}))
        assert [one.claim for one in found if one.status == "FAIL"] == []
        (labels,) = (one for one in found if one.claim == "labels")
        assert labels.figure == "dropped, given"
    with variant("dumo", ["dumo.clip = 2.0"]) as subject:
        assert not subject.needs_labels


def test_a_variant_can_fail(monkeypatch, capsys):
    @dataclass(frozen=True, kw_only=True)
    class Mine(Curriculum):
        """Right by default alone."""

        sign: int = -1

        def target(self, v, change):
            return v + self.sign * change

    few = {name: CLAIMS[name] for name in ("one loss per row", "fixed point at a Gaussian")}
    monkeypatch.setattr("benchmarks.conformance.report.claims_for", lambda name: few)
    with objectives.temporary("mine_signed", Mine):
        assert command("mine_signed") == 0
        assert command("mine_signed", "--set", "mine_signed.sign = 1") == 1
    said = capsys.readouterr().err
    assert "mine_signed with mine_signed.sign = 1 fails: fixed point at a Gaussian" in said


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("dumo.omegga = 0.5", "omegga"),
        ("dumo.omega = 1.5", "dumo.omega = 1.5 must lie in"),
        ("dumo.omega = 'much'", "dumo.omega"),
        ("dumo.omega", "'dumo.omega' is no binding"),
        ("mean_flow.omega = 2.0", "mean_flow.omega changes nothing of the objective 'dumo'"),
        ("ema.decay = 0.9", "ema.decay changes nothing"),
    ],
)
def test_a_binding_that_is_wrong_is_refused_by_its_name(quick, binding, said, capsys):
    assert command("dumo", "--set", binding) == 2
    assert said in capsys.readouterr().err
