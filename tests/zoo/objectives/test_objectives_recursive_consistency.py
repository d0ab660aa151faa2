"""RCGM: its loss computed a second time, its weight, and its relation to DuMo's target."""

from __future__ import annotations

import math

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance.networks import Toy
from registry.protocols import NULL_LABEL
from zoo.objectives.recursive_consistency import RecursiveConsistency
from zoo.residuals import Rcgm


def second_opinion(seen, objective, teacher):
    """Row by row, with the steps of the map one after the other."""
    call, losses = seen.trained(), []
    x1 = noise_of(call.x, call.t, seen.batch.x0)
    for i in range(len(call.x)):
        x, t, r = call.x[i : i + 1], call.t[i : i + 1].double(), call.r[i : i + 1].double()
        label = call.labels[i : i + 1]

        def u(net, x, t, r, label=label):
            return net(x, t, r, {"label": label})["u"]

        v = (x1 - seen.batch.x0)[i : i + 1]
        if objective.omega and label != NULL_LABEL:
            null = u(teacher, x, t, t, torch.full_like(label, NULL_LABEL))
            v = v + objective.omega * (u(teacher, x, t, t) - null)
        m = max(t - objective.residual.delta, r)
        z, total, order = x - (t - m) * v, 0.0, objective.residual.order
        for j in range(order):
            start, end = m - j * (m - r) / order, m - (j + 1) * (m - r) / order
            step = (start - end) * u(teacher, z, start, end)
            total, z = total + step, z - step
        g = ((t - r) * u(seen.net, x, t, r) - total) / (t - m) - v
        out = u(seen.net, x, t, r)
        error = (out - (out - g.clamp(-1, 1)).detach()).square().mean()
        factor = 1 + math.tan(float(1 - t + r) * math.pi / 2.5)
        losses.append(factor * error / (error.detach() + 1e-6).sqrt())
    return torch.stack(losses)


@pytest.mark.parametrize(
    "settings",
    [{}, {"residual": Rcgm(order=1, delta=0.3)}, {"residual": Rcgm(order=4), "omega": 0.5}],
    ids=["default", "order_1", "order_4_guided"],
)
def test_loss_agrees_row_by_row(settings):
    objective = RecursiveConsistency(label_dropout=0.3, **settings)
    objective.teacher.attach(teacher := Toy((2,), ("u",), seed=5))
    seen = watch(objective, n=32)
    loss = second_opinion(seen, objective, teacher)
    # Dividing by delta = 0.01 turns float32 times into errors of 1e-5.
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=1e-4, atol=1e-4)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_short_steps_weigh_up_to_four_times_as_much():
    gaps = torch.tensor([1.0, 0.0], dtype=torch.float64)
    ends = RecursiveConsistency().factor(gaps)
    torch.testing.assert_close(ends, torch.tensor([1.0, 1 + math.tan(math.pi / 2.5)]).double())
    assert RecursiveConsistency(favours_short_steps=False).factor(gaps).tolist() == [1.0, 1.0]


def test_omega_of_one_is_refused():
    with pytest.raises(ValueError, match=r"recursive_consistency.omega = 1.0 must lie in \[0, 1\)"):
        RecursiveConsistency(omega=1.0)
