"""FACM: its loss computed a second time, its guidance, and what its anchor and clip move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance.networks import Toy
from registry.protocols import NULL_LABEL
from zoo.anchored import anchor
from zoo.objectives.decm import DECM
from zoo.objectives.facm import FACM
from zoo.points.velocities import FromTeacher, Own
from zoo.teachers import Frozen
from zoo.times import ArctanNormal, Uniform


def distilled(**settings):
    objective = FACM(velocity=FromTeacher(), teacher=Frozen(), **settings)
    objective.teacher.attach(teacher := Toy((2,), ("u",), seed=5))
    return objective, teacher


def second_opinion(seen, objective, teacher=None):
    """In the paper's clock: tau = 1 - t, F = -u, and a velocity towards the data."""
    n, call = len(seen.batch), seen.trained()
    x, label = call.x[:n], call.labels[:n]
    tau, end = 1 - call.t[:n].double(), torch.ones(n, dtype=torch.float64)
    null, w = torch.full_like(label, NULL_LABEL), objective.guidance_scale

    def F(x, tau, s, label=label, net=seen.net):
        return -net(x, 1 - tau, 1 - s, {"label": label})["u"]

    v = seen.batch.x0 - noise_of(x, call.t[:n], seen.batch.x0)
    if teacher is not None:
        v = F(x, tau, tau, net=teacher)
    outside = (tau < 1 - objective.guidance_interval[1])[:, None]
    without = F(x, tau, tau, null, net=teacher or seen.net)
    without = torch.where(outside | (label == null)[:, None], v, without)
    v = (without + w * (v - without)).detach()

    along = F(x, tau, tau).detach() if isinstance(objective.velocity, Own) else v
    flow = F(x, tau, tau)
    matching = (flow - v).square().mean(1)
    cosine = (flow * v).sum(1) / (flow.norm(dim=1) * v.norm(dim=1))
    u, du = torch.func.jvp(lambda x, tau: F(x, tau, end), (x, tau), (along, end))
    raw = (u - along - (1 - tau)[:, None] * du).detach()
    step = (1 - tau**objective.relaxation)[:, None] * raw.clamp(-objective.clip, objective.clip)
    e = (u - (u - step).detach()).square().mean(1)
    consistency = (math.pi / 2 * tau).cos() * e / (e.detach() + 1e-3).sqrt()
    loss = consistency + matching + objective.cosine_weight * (1 - cosine)
    return loss, {"consistency": raw.square().mean(1), "v": matching.detach()}


SETTINGS = {
    "default": {},
    "guided": {"guidance_scale": 1.75, "guidance_interval": (0.0, 0.6)},
    "relaxed": {"relaxation": 0.8, "clip": 0.3, "cosine_weight": 0.4, "times": Uniform()},
}


@pytest.mark.parametrize("taught", [False, True], ids=["scratch", "distilled"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_agrees_row_by_row(name, taught):
    settings, teacher = SETTINGS[name] | {"label_dropout": 0.3}, None
    objective = FACM(**settings)
    if taught:
        objective, teacher = distilled(**settings)
    seen = watch(objective, n=24)
    loss, raw = second_opinion(seen, objective, teacher)
    seen.agrees(loss)
    for key, rows in raw.items():
        torch.testing.assert_close(seen.out.terms[key], rows, rtol=1e-5, atol=1e-6)
    assert 0 < (seen.trained().labels[:24] == NULL_LABEL).sum() < 24


def test_own_velocity_is_for_the_consistency_alone():
    objective = FACM(velocity=Own(), guidance_scale=1.5)
    seen = watch(objective, n=24)
    seen.agrees(second_opinion(seen, objective)[0])


@pytest.mark.parametrize(
    "wrong",
    [{"relaxation": 0.6}, {"clip": 0.9}, {"cosine_weight": 0.9}, {"guidance_scale": 1.7},
     {"guidance_interval": (0.0, 0.8)}],
    ids=lambda one: next(iter(one)),
)  # fmt: skip
def test_another_setting_is_another_loss(wrong):
    """The negative control of the second computation: each number in it counts."""
    objective, teacher = distilled(guidance_scale=1.75)
    seen = watch(objective, n=64)
    loss, _ = second_opinion(seen, replace(objective, **wrong), teacher)
    assert not torch.allclose(seen.out.per_sample, loss, rtol=1e-4)


def test_decm_without_its_third_cluster_is_facm():
    """DE-CM takes over both losses; times and labels are drawn in the same order."""
    same = {"times": Uniform(), "label_dropout": 0.3}
    ours, teacher = distilled(guidance_scale=1.75, guidance_interval=(0.0, 1.0), **same)
    theirs = DECM(teacher=Frozen(), n2n_every=0, cosine_weight=1.0, guidance_scale=1.75, **same)
    theirs.teacher.attach(teacher)
    found, wanted = watch(ours, n=24), watch(theirs, n=24)
    torch.testing.assert_close(found.out.per_sample, wanted.out.per_sample, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.gradient(), wanted.gradient(), rtol=1e-9, atol=1e-12)


def test_cosine_moves_the_optimum_of_a_conditional_velocity():
    """As the docstring says: the mean of two velocities is no optimum, but one velocity is."""
    two = torch.tensor([[3.0, 0.0], [-1.0, 2.0]])
    for v, moved in ((two, True), (two[:1], False)):
        u = v.mean(0, keepdim=True).requires_grad_()
        for cosine_weight in (0.0, 1.0):
            loss = anchor(u.expand_as(v), v, cosine_weight).mean()
            (gradient,) = torch.autograd.grad(loss, u)
            assert (float(gradient.norm()) > 0.05) == (moved and cosine_weight > 0)


def test_times_are_those_of_the_released_code():
    """tau = 1 - (2 / pi) arctan(exp(1.6 z - 0.8))."""
    assert FACM().times == ArctanNormal(mean=-0.8, std=1.6)
    z = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    t, r = ArctanNormal()(1000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(1 - t, 1 - 2 / math.pi * torch.atan((1.6 * z - 0.8).exp()))
    assert t.equal(r)


def test_a_step_predicts_the_flow_and_then_the_map():
    objective, _ = distilled(guidance_scale=1.75)
    seen = watch(objective, n=12)
    assert [call.with_gradient for call in seen.calls] == [True, True]
    assert seen.calls[0].t.equal(seen.calls[0].r)
    assert not seen.calls[1].r.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relaxation": 0.0}, "facm.relaxation = 0.0 must be positive"),
        ({"clip": -1.0}, "facm.clip = -1.0 must be positive"),
        ({"guidance_scale": 0.5}, "facm.guidance_scale = 0.5 must be at least 1"),
        ({"guidance_interval": (0.5, 0.2)}, "facm.guidance_interval"),
        ({"teacher": Frozen()}, r"Bind facm.velocity = @teacher\(\)"),
        ({"velocity": FromTeacher()}, r"Bind facm.teacher = @frozen\(\)"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FACM(**settings)
