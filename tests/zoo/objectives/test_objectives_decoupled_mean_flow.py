"""Decoupled MeanFlow: its loss computed a second time, its two draws, its weight and guidance."""

from __future__ import annotations

import pytest
import torch
from objective_cases import noise_of, watch

from registry.protocols import NULL_LABEL
from zoo.objectives.decoupled_mean_flow import DecoupledMeanFlow
from zoo.ops import like
from zoo.points.velocities import FromTeacher, Own
from zoo.teachers import Frozen
from zoo.times import LogitNormal, TwoLogitNormals, UniformPair
from zoo.weighting import Cauchy, Unweighted

GUIDED = {"omega": 0.6, "guidance_interval": (0.0, 0.7), "label_dropout": 0.3}


def second_opinion(seen, objective, sign=1.0, along="target"):
    """Half of log(e^-phi mse + c) + phi, of flow matching and of MeanFlow."""
    x0, weight = seen.batch.x0, objective.weight
    fm, mf = (call for call in seen.calls if call.with_gradient)
    losses = []
    for call, is_map in ((fm, False), (mf, True)):
        x, t, r, label = call.x, call.t.double(), call.r.double(), call.labels
        v = v_c = noise_of(call.x, call.t, x0) - x0

        def u(x, t, r, label=label):
            return seen.net(x, t, r, {"label": label})

        if objective.omega:
            with torch.no_grad():
                null = torch.full_like(label, NULL_LABEL)
                dv = u(x, t, t)["u"] - u(x, t, t, null)["u"]
            low, high = objective.guidance_interval
            rows = (label != NULL_LABEL) & (low <= t) & (t <= high)
            v = torch.where(rows[:, None], v_c + objective.omega * dv, v_c)
        target = v
        if is_map:
            tangents = (v if along == "target" else v_c, torch.ones_like(t), torch.zeros_like(r))
            _, du_dt = torch.func.jvp(lambda *at: u(*at)["u"], (x, t, r), tangents)
            target = v - sign * like(t - r, x) * du_dt.detach()
        out = u(x, t, r)
        error = (out["u"] - target).square().flatten(1).mean(1)
        if isinstance(weight, Cauchy):
            phi = out["logvar"]
            error = torch.log(error / phi.exp() + weight.offset) + weight.share * phi
        losses.append(error)
    return 0.5 * sum(losses)


@pytest.mark.parametrize(
    "settings",
    [{}, GUIDED, {"weight": Cauchy(offset=1.0, share=0.5)}, {"weight": Unweighted(), **GUIDED}],
    ids=["default", "guided", "paper's weight", "unweighted"],
)
def test_loss_is_that_of_the_released_code(settings):
    objective = DecoupledMeanFlow(**settings)
    seen = watch(objective, n=24)
    seen.agrees(second_opinion(seen, objective))


def test_other_signs_and_tangents_are_other_losses():
    """The negative controls of the test above."""
    objective = DecoupledMeanFlow(**GUIDED)
    seen = watch(objective, n=24)
    ours = seen.gradient()
    for wrong in ({"sign": -1.0}, {"along": "conditional"}):
        theirs = seen.gradient(second_opinion(seen, objective, **wrong))
        assert float((ours - theirs).norm() / ours.norm()) > 1e-3


def test_both_terms_are_on_every_row_with_draws_of_their_own():
    seen = watch(DecoupledMeanFlow(label_dropout=0.5), n=24)
    fm, mf = (call for call in seen.calls if call.with_gradient)
    assert len(fm.x) == len(mf.x) == 24
    assert fm.t.equal(fm.r)
    assert (mf.r < mf.t).all()
    noise = [noise_of(call.x, call.t, seen.batch.x0) for call in (fm, mf)]
    assert abs(float(torch.corrcoef(torch.stack([z.flatten() for z in noise]))[0, 1])) < 0.5
    assert not fm.t.equal(mf.t)
    assert not fm.labels.equal(mf.labels)


def test_defaults_are_those_of_the_released_code():
    objective = DecoupledMeanFlow()
    assert objective.times_v == LogitNormal(mean=0.0, std=1.0)
    times = objective.times
    assert (times.t_mean, times.t_std, times.r_mean, times.r_std) == (0.4, 1.0, -1.2, 1.0)
    assert (times.off_diagonal_fraction, times.pairing) == (1.0, "sorted")
    assert objective.weight == Cauchy(offset=0.01, share=1.0)
    assert DecoupledMeanFlow(omega=0.6).guidance_scale == pytest.approx(2.5)


def test_a_law_with_rows_on_the_diagonal_differentiates_the_others_alone():
    seen = watch(DecoupledMeanFlow(times=UniformPair(off_diagonal_fraction=0.25)))
    rows = [(len(call.x), call.t.equal(call.r)) for call in seen.calls]
    assert rows == [(12, True), (3, False), (9, True)]


def test_a_frozen_teacher_gives_the_guided_velocity_of_the_same_scale():
    from benchmarks.conformance.networks import Toy

    torch.manual_seed(5)
    trained = Toy((2,), ("v",))
    teacher = Frozen()
    teacher.attach(trained)
    settings = {"velocity": FromTeacher(), "teacher": teacher, "weight": Unweighted()}
    times = TwoLogitNormals(off_diagonal_fraction=0.0)  # rows of flow matching alone
    seen = watch(DecoupledMeanFlow(omega=0.5, times=times, label_dropout=0.0, **settings))
    expected = 0
    for call in (call for call in seen.calls if call.with_gradient):
        x, t, label = call.x, call.t, {"label": call.labels}
        v, null = (
            trained(x, t, t, y)["v"]
            for y in (label, {"label": torch.full_like(call.labels, NULL_LABEL)})
        )
        u = seen.net(x, t, t, label)["u"]
        expected = expected + 0.5 * (u - (null + 2.0 * (v - null))).square().mean(1)
    seen.agrees(expected)


def test_own_velocity_moves_the_state_and_is_learned_beside():
    seen = watch(DecoupledMeanFlow(velocity=Own()))
    assert sum(not call.with_gradient for call in seen.calls) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"omega": 1.0}, r"decoupled_mean_flow.omega = 1.0 must lie in \[0, 1\)"),
        ({"guidance_interval": (0.7, 0.1)}, "decoupled_mean_flow.guidance_interval"),
        ({"velocity": FromTeacher()}, "the velocity of a teacher that was trained before"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DecoupledMeanFlow(**settings)
