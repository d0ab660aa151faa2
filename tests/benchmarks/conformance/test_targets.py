"""What an objective declares to differentiate may be, and every other target is guarded."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from benchmarks.conformance.gradients import not_through_targets
from benchmarks.conformance.report import CLAIMS
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from registry import objectives
from registry.protocols import LossOutput, Teacher, differentiated_by
from zoo.derivatives.methods import Dual
from zoo.objectives.self_distillation import SelfDistillation
from zoo.ops import like, mean_flat, normal_like
from zoo.teachers import EmaTeacher


def guarded(make):
    return run_claim("targets", not_through_targets, Subject("mine", make))


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """The velocity at the end of a step is that of an averaged network: TVM, and LSD."""

    heads: ClassVar = ("u",)
    differentiates: ClassVar = ("derivative",)

    teacher: Teacher = field(default_factory=EmaTeacher)

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t, r = torch.rand(2, len(x0), generator=rng).sort(0, descending=True).values
        x = x0 + like(t, x0) * (x1 - x0)

        def flow_map(r):
            return x - like(t - r, x0) * net(x, t, r, batch.cond)["u"]

        end, velocity = torch.func.jvp(flow_map, (r,), (torch.ones_like(r),))
        return LossOutput(
            per_sample=mean_flat((velocity - self.target(net, end, r, batch.cond)) ** 2)
        )

    def target(self, net, end, r, cond):
        return self.teacher(net)(end, r, r, cond)["u"]


class Undeclared(Terminal):
    differentiates: ClassVar = ()


class TeacherInside(Terminal):
    """A teacher that is evaluated with gradient."""

    def target(self, net, end, r, cond):
        return (self.teacher.network or net)(end, r, r, cond)["u"]


class TeacherBehind(Terminal):
    """The same, at a point that is held fixed."""

    def target(self, net, end, r, cond):
        return (self.teacher.network or net)(end.detach(), r, r, cond)["u"]


class Itself(Terminal):
    """The network in training, without a stop-gradient."""

    def target(self, net, end, r, cond):
        return net(end, r, r, cond)["u"]


class ItselfDeclared(Itself):
    """The input is declared, but the output of the target is differentiated as well."""

    differentiates: ClassVar = ("derivative", "input")


class TeacherInsideDeclared(TeacherInside):
    differentiates: ClassVar = ("derivative", "input")


class Residual(Itself):
    """The squared residual of the network itself, as in self-distillation with a full gradient."""

    differentiates: ClassVar = ("derivative", "input", "target")


class TeacherInResidual(TeacherInside):
    differentiates: ClassVar = ("derivative", "input", "target")


class FrozenInput(Terminal):
    """The gradient reaches the point of the target and no weight of it."""

    differentiates: ClassVar = ("derivative", "input")

    def target(self, net, end, r, cond):
        weights = {name: p.detach() for name, p in net.named_parameters()}
        return torch.func.functional_call(net, weights, (end, r, r, cond))["u"]


class FrozenInputUndeclared(FrozenInput):
    differentiates: ClassVar = ("derivative",)


@dataclass(frozen=True, kw_only=True)
class TwoSteps:
    """Two steps of the network, trained together towards one step of its average."""

    heads: ClassVar = ("u",)
    differentiates: ClassVar = ("input",)

    teacher: Teacher = field(default_factory=EmaTeacher)

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        t, m, r = torch.rand(3, len(x0), generator=rng).sort(0, descending=True).values
        x = x0 + like(t, x0) * (x1 - x0)
        x_m = x - like(t - m, x0) * net(x, t, m, batch.cond)["u"]
        x_r = x_m - like(m - r, x0) * net(x_m, m, r, batch.cond)["u"]
        target = x - like(t - r, x0) * self.target(net)(x, t, r, batch.cond)["u"]
        return LossOutput(per_sample=mean_flat((x_r - target) ** 2))

    def target(self, net):
        return self.teacher(net)


class TwoStepsOfItself(TwoSteps):
    def target(self, net):
        return net


class TwoStepsResidual(TwoStepsOfItself):
    differentiates: ClassVar = ("input", "target")


class TwoStepsUndeclared(TwoSteps):
    differentiates: ClassVar = ()


@pytest.mark.parametrize("make", [Terminal, FrozenInput, Residual, TwoSteps, TwoStepsResidual])
def test_what_is_declared_may_be_differentiated(make):
    result = guarded(make)
    assert result.status == "ok", result.reason
    assert all(way in result.figure for way in make.differentiates)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Undeclared, "through a derivative of the network"),
        (TeacherInside, "through the input of an evaluation"),
        (TeacherBehind, "teacher's network"),
        (Itself, "through the input of an evaluation"),
        (ItselfDeclared, "compared with each other"),
        (TeacherInsideDeclared, "teacher's network"),
        (TeacherInResidual, "teacher's network"),
        (FrozenInputUndeclared, "through the input of an evaluation"),
        (TwoStepsUndeclared, "through the input of an evaluation"),
        (TwoStepsOfItself, "compared with each other"),
    ],
)
def test_every_other_target_is_guarded(make, reason):
    result = guarded(make)
    assert result.status == "FAIL", result.figure
    assert reason in result.reason
    if "undeclared" in make.__name__.lower():
        assert "declare differentiates" in result.hint


class Idle(Terminal):
    differentiates: ClassVar = ("derivative", "input")


class IdleTarget(Terminal):
    differentiates: ClassVar = ("derivative", "target")


class HeldDual(Dual):
    """A derivative that no gradient passes."""

    def with_graph(self, fn, primals, tangents, key):
        out, derivative = super().with_graph(fn, primals, tangents, key)
        return out, derivative.detach()


def held_derivative():
    return SelfDistillation(derivative=HeldDual())


@pytest.mark.parametrize(
    ("make", "idle"),
    [(Idle, "input"), (IdleTarget, "target"), (held_derivative, "derivative")],
)
def test_what_is_declared_and_never_differentiated_is_rejected(make, idle):
    result = guarded(make)
    assert result.status == "FAIL"
    assert f"no gradient runs through any {idle}" in result.reason
    assert ".detach()" in result.hint


@pytest.mark.slow
def test_no_other_claim_rejects_a_derivative_that_is_held():
    subject = Subject("self_distillation", held_derivative)
    failed = [n for n, c in CLAIMS.items() if run_claim(n, c, subject).status == "FAIL"]
    assert failed == ["no gradient through targets"]


def test_full_gradient_may_stand_for_more_than_is_differentiated():
    @dataclass(frozen=True, kw_only=True)
    class Former:
        heads: ClassVar = ("u",)
        full_gradient: ClassVar = True

        teacher: Teacher = field(default_factory=EmaTeacher)
        loss, target = Terminal.loss, Terminal.target

    assert guarded(Former).status == "note"


@pytest.mark.parametrize("declared", ["derivative", ("derivatives",), True])
def test_what_is_no_way_of_a_gradient_is_refused(declared):
    @dataclass(frozen=True)
    class Mine(Terminal):
        differentiates: ClassVar = declared

    with pytest.raises(ValueError, match="'derivative' and 'input'"):
        with objectives.temporary("mine_differentiates", Mine):
            pass


def test_full_gradient_goes_on_working_for_one_release(caplog):
    @dataclass(frozen=True)
    class Mine:
        heads: ClassVar = ("u",)
        full_gradient: ClassVar = True

        def loss(self, net, batch, rng):
            raise NotImplementedError

    with caplog.at_level(logging.WARNING), objectives.temporary("mine_of_old", Mine):
        assert "differentiates: ClassVar" in caplog.text
    assert differentiated_by(Mine) == ("derivative", "input")
