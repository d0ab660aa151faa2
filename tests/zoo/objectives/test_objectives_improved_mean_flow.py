"""Improved MeanFlow: its loss computed a second time, its floor, and its guidance law."""

from __future__ import annotations

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance.subject import GAUSSIAN, law_batch
from registry.protocols import NULL_LABEL
from zoo.objectives.improved_mean_flow import ImprovedMeanFlow
from zoo.ops import like
from zoo.times import LogitNormalPair, UniformPair
from zoo.weighting import Adaptive, Unweighted

HALF = UniformPair(off_diagonal_fraction=0.5)


def second_opinion(seen, direction="own"):
    """|| V - v ||^2 and || v - v ||^2 of every row, V = u + (t - r) sg[du/dt]."""
    call, x0 = seen.trained(), seen.batch.x0
    x, t, r, cond = call.x, call.t.double(), call.r.double(), {"label": call.labels}
    v_c = noise_of(call.x, call.t, x0) - x0

    def u(x, t, r):
        return seen.net(x, t, r, cond)["u"]

    along = seen.net(x, t, t, cond)["v"].detach() if direction == "own" else v_c
    value, du_dt = torch.func.jvp(u, (x, t, r), (along, torch.ones_like(t), 0 * r))
    V = value + like(t - r, x) * du_dt.detach()
    losses = []
    for prediction in (V, seen.net(x, t, r, cond)["v"]):
        error = (prediction - v_c).square().flatten(1).sum(1)
        losses.append(error / (error.detach() + 0.01))
    return sum(losses)


def test_loss_is_the_published_one():
    seen = watch(ImprovedMeanFlow(times=HALF, label_dropout=0.4), n=24)
    seen.agrees(second_opinion(seen))
    assert 0 < (seen.trained().labels == NULL_LABEL).sum() < 24


def test_a_conditional_tangent_is_another_loss():
    """The negative control: MeanFlow's tangent, along which the loss is no plain regression."""
    seen = watch(ImprovedMeanFlow(times=HALF), n=24)
    ours, theirs = seen.gradient(), seen.gradient(second_opinion(seen, "conditional"))
    assert float((ours - theirs).norm() / ours.norm()) > 0.02


def test_defaults_are_those_of_the_released_code():
    objective = ImprovedMeanFlow()
    assert objective.times == LogitNormalPair(mean=-0.4, std=1.0, off_diagonal_fraction=0.5)
    assert objective.weight_u == objective.weight_v == Adaptive(power=1.0, offset=0.01)


def test_floor_is_the_variance_of_the_velocity_whatever_r_is():
    """s^2 / S_t^2 for either output: what MeanFlow's loss has only where r = t."""
    batch = law_batch(GAUSSIAN, 40_000, 0)
    objective = ImprovedMeanFlow(
        weight_u=Unweighted(), weight_v=Unweighted(), times=UniformPair(off_diagonal_fraction=1.0)
    )
    out = objective.loss(GAUSSIAN, batch, torch.Generator().manual_seed(0))
    t, r = out.t.double(), out.r.double()
    variance = (1 - t[:, None]) ** 2 * GAUSSIAN.std**2 + t[:, None] ** 2
    floor = 2 * (GAUSSIAN.std**2 / variance).sum(1)
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
        rows = (low * t <= r) & (r < high * t)
        excess = (out.per_sample / floor)[rows].detach() - 1
        assert float(excess.mean().abs() / (excess.std() / rows.sum().sqrt())) < 4


@pytest.mark.parametrize("k", [0, 6, 12])
def test_derivative_is_taken_on_the_rows_with_r_below_t_alone(k):
    times = UniformPair(off_diagonal_fraction=k / 12)
    seen = watch(ImprovedMeanFlow(times=times))
    rows = [len(call.x) for call in seen.calls]
    assert rows == ([0, 12] if k == 0 else [12, 12] if k == 12 else [6, 6, 6])
    assert [call.with_gradient for call in seen.calls] == [False] + [True] * (len(rows) - 1)
