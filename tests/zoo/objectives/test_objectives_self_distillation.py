"""Self-distillation: its losses computed a second time, from the map itself, and its identities."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance import mutations
from benchmarks.conformance.networks import ExactNetwork
from benchmarks.conformance.report import claims_for
from benchmarks.conformance.subject import GAUSSIAN, Subject, law_batch
from benchmarks.conformance.verdicts import verdict
from registry.protocols import NULL_LABEL, parts
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.objectives.self_distillation import SelfDistillation
from zoo.ops import like
from zoo.oracles import exact_on
from zoo.paths import Linear
from zoo.points.velocities import FromTeacher, Own
from zoo.teachers import EmaTeacher, Frozen
from zoo.times import UniformPair
from zoo.weighting import LearnedLogvar, Unweighted

HALF = UniformPair(off_diagonal_fraction=0.5)
N, K = 24, 12
# Which calls predict: a target comes between those of the rows with r < t and of those with r = t.
PREDICTIONS = {"lsd": (0, 2), "esd": (1, 2), "psd": (0, 3)}
each_kind = pytest.mark.parametrize("kind", PREDICTIONS)


def predicted(seen, kind):
    """(x, t, r, label) of the rows with r < t, and of those with r = t."""
    calls = [seen.calls[i] for i in PREDICTIONS[kind]]
    return [(c.x, c.t.double(), c.r.double(), c.labels) for c in calls]


def second_opinion(seen, kind, gradient, sign=1):
    """The squared residual of the identity as the paper writes it, of the map X and not of u."""
    (x, t, r, label), (x_d, t_d, _, label_d) = predicted(seen, kind)

    def out(x, t, r, label=label):
        return seen.net(x, t, r, {"label": label})

    def X(x, t, r):
        return x - like(t - r, x) * out(x, t, r)["u"]

    def held(target):
        return target.detach() if gradient == "semi" else target

    one = torch.ones_like(t)
    if kind == "lsd":
        end, moved = torch.func.jvp(lambda r: X(x, t, r), (r,), (one,))
        residual = moved - sign * held(out(held(end), r, r)["u"])
    elif kind == "esd":
        v = held(out(x, t, t)["u"])
        residual = torch.func.jvp(lambda x, t: X(x, t, r), (x, t), (sign * v, one))[1]
    else:
        m = seen.calls[1].r.double()
        assert ((r < m) & (m < t)).all()
        two = X(held(X(x, t, m)), m, r)
        residual = (X(x, t, r) - sign * held(two)) / like(t - r, x)
    velocity = noise_of(x_d, t_d, seen.batch.x0[K:]) - seen.batch.x0[K:]
    error = torch.cat([residual, out(x_d, t_d, t_d, label_d)["u"] - velocity]).square().mean(1)
    logvar = torch.cat([out(x, t, r)["logvar"], out(x_d, t_d, t_d, label_d)["logvar"]])
    return (-logvar).exp() * error + logvar


@each_kind
@pytest.mark.parametrize("gradient", ["semi", "full"])
def test_loss_is_the_published_one(kind, gradient):
    objective = SelfDistillation(kind=kind, gradient=gradient, times=HALF, label_dropout=0.4)
    seen = watch(objective, n=N)
    seen.agrees(second_opinion(seen, kind, gradient))
    labels = torch.cat([rows[3] for rows in predicted(seen, kind)])
    assert 0 < (labels == NULL_LABEL).sum() < N


@each_kind
def test_another_sign_or_the_other_gradient_is_another_gradient(kind):
    """The negative controls of the test above."""
    seen = watch(SelfDistillation(kind=kind, times=HALF), n=N)
    ours = seen.gradient()
    for wrong in (second_opinion(seen, kind, "semi", sign=-1), second_opinion(seen, kind, "full")):
        assert float((ours - seen.gradient(wrong)).norm() / ours.norm()) > 5e-3


@each_kind
@pytest.mark.parametrize("how", [{}, {"split": "midpoint"}], ids=str)
def test_identity_holds_at_the_exact_map_and_not_at_one_that_forgets_the_gap(kind, how):
    network = ExactNetwork(exact_on(GAUSSIAN, Linear()), ("u",))
    objective = SelfDistillation(kind=kind, times=HALF, weight=Unweighted(), **how)

    def residual(net):
        out = objective.loss(net, law_batch(GAUSSIAN, 64, 0), torch.Generator().manual_seed(0))
        return float(out.terms["map"].max()) ** 0.5

    assert residual(network) < 1e-5  # float32 times
    assert residual(lambda x, t, r, cond: network(x, t, t, cond)) > 0.1


def test_midpoint_is_two_half_steps():
    seen = watch(SelfDistillation(kind="psd", split="midpoint", times=HALF), n=N)
    first, second = seen.calls[1:3]
    assert not first.with_gradient
    assert not second.with_gradient
    torch.testing.assert_close(first.r, (first.t + seen.out.r[:K]) / 2)
    torch.testing.assert_close(second.t, first.r)


def test_uniform_splits_are_uniform():
    seen = watch(SelfDistillation(kind="psd", times=UniformPair(off_diagonal_fraction=1.0)), n=800)
    share = (seen.calls[0].t - seen.calls[1].r) / (seen.out.t - seen.out.r)
    assert share.mean() == pytest.approx(0.5, abs=0.05)
    assert share.std() == pytest.approx(12**-0.5, abs=0.03)


def test_defaults_are_those_of_the_published_code():
    objective = SelfDistillation()
    assert (objective.kind, objective.gradient) == ("lsd", "semi")
    assert objective.times == UniformPair(off_diagonal_fraction=0.25, diagonal="uniform")
    assert objective.weight == LearnedLogvar()


@each_kind
def test_what_is_differentiated_is_declared(kind):
    semi, full = (SelfDistillation(kind=kind, gradient=g).differentiates for g in ("semi", "full"))
    assert semi == (() if kind == "psd" else ("derivative",))
    assert (
        full
        == {
            "lsd": ("derivative", "input", "target"),
            "esd": ("derivative", "target"),
            "psd": ("input", "target"),
        }[kind]
    )


def test_psd_holds_no_derivative():
    objective = SelfDistillation(kind="psd")
    assert objective.derivative is None
    assert not any(hasattr(part, "needs_forward_ad") for _, part in parts(objective))
    with pytest.raises(ValueError, match=r"self_distillation.derivative = None does not go with"):
        dataclasses.replace(objective, kind="lsd")


@pytest.mark.parametrize("kind", ["lsd", "esd"])
def test_a_trained_velocity_is_distilled(kind):
    objective = SelfDistillation(
        kind=kind, velocity=FromTeacher(), teacher=Frozen(), weight=Unweighted(), times=HALF
    )
    network = ExactNetwork(exact_on(GAUSSIAN, Linear()), ("v",)).requires_grad_(False)
    objective.teacher.attach(network)
    seen = watch(objective, n=N)
    call = seen.calls[1]  # the targets are asked of another network
    u = seen.net(call.x, call.t, call.t, {"label": call.labels})["u"]
    error = (u - network(call.x, call.t, call.t)["v"]).square().mean(1)
    torch.testing.assert_close(seen.out.terms["v"], error.detach())


@pytest.mark.parametrize("kind", [pytest.param("esd", marks=pytest.mark.slow), "psd"])
def test_planted_mistakes_of_the_other_kinds_are_rejected(kind):
    """Those of lsd are in test_objectives_common.py."""
    subject = Subject("self_distillation", lambda: SelfDistillation(kind=kind))
    claims = claims_for("self_distillation")
    effective = {}
    for mutation in mutations.MUTATIONS:
        killer = {
            "no stop-gradient": "no gradient through targets",
            "teacher at swapped times": "calls within 0 <= r <= t <= 1",
            mutations.RECOMBINED: "samplers reach the data",
        }.get(mutation.name, "fixed point at a Gaussian")
        found = verdict(mutation, subject, {killer: claims[killer]})
        if found is not None and not found.no_effect:
            effective[mutation.name] = found.survived
    assert not any(effective.values()), effective
    of_derivatives = {"tangents (v, 0, 1)", "derivative with the other sign"}
    of_teachers = {"teacher at swapped times", "later steps of a teacher at its first t"}
    assert (of_derivatives if kind == "esd" else of_teachers) <= set(effective)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "lmd"}, "self_distillation.kind = 'lmd'; allowed: lsd, esd, psd"),
        ({"gradient": "none"}, "self_distillation.gradient = 'none'; allowed: semi, full"),
        ({"split": "thirds"}, "self_distillation.split = 'thirds'; allowed: uniform, midpoint"),
        ({"derivative": None}, "psd takes none, lsd and esd need one such as @dual()"),
        ({"kind": "psd", "derivative": Jvp()}, "psd takes none"),
        ({"kind": "psd", "derivative": FiniteDifference()}, "psd takes none"),
        ({"gradient": "full", "teacher": EmaTeacher()}, "sends a gradient into the targets"),
        ({"velocity": Own()}, "self_distillation does not have both"),
        ({"velocity": FromTeacher()}, "Bind self_distillation.teacher = @frozen()"),
        ({"teacher": Frozen()}, "Bind self_distillation.velocity = @teacher()"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        SelfDistillation(**settings)


def test_the_default_derivative_may_be_named_for_every_kind():
    for kind in PREDICTIONS:
        assert SelfDistillation(kind=kind, derivative=Dual()) == SelfDistillation(kind=kind)
