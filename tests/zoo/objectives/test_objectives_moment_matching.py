"""IMM: its loss computed a second time, pair by pair, its middle time, weight and labels."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from registry.protocols import NULL_LABEL
from zoo.objectives import moment_matching
from zoo.objectives.moment_matching import MomentMatching
from zoo.paths import Linear, TrigFlow
from zoo.times import BetaPair

SETTINGS = {
    "default": {},
    "long_steps": {"halvings": 6, "group": 3},
    "without_itself": {"halvings": 8, "with_itself": False},
    "cifar10": {"t_min": 0.006, "halvings": 15, "a": 1.0, "b": 5.0},
}


def second_opinion(seen, objective, with_itself=None):
    """From the points of the trained call alone: pairs one by one, in closed form for the path."""
    call, size = seen.trained(), objective.group
    kept = objective.with_itself if with_itself is None else with_itself
    t, r = call.t.double(), call.r.double()
    eta, top = t / (1 - t), objective.t_max / (1 - objective.t_max)
    fall = (top - objective.t_min / (1 - objective.t_min)) / 2**objective.halvings
    m = torch.maximum(torch.minimum(1 - 1 / (1 + (eta - fall).clamp_min(0)), t - 1e-4), r)
    x0 = data_of(seen, size)
    x1 = noise_of(call.x, t, x0)
    x_m = (1 - m)[:, None] * x0 + m[:, None] * x1
    labels = {"label": call.labels}
    y = call.x - (t - r)[:, None] * seen.net(call.x, t, r, labels)["u"]
    z = (x_m - (m - r)[:, None] * seen.net(x_m, m, r, labels)["u"]).detach()

    losses = []
    for i in range(len(t)):
        first, total = i - i % size, 0.0
        mates = [k for k in range(first, first + size) if kept or k != i]
        for k in mates:
            for factor, a, b in ((1, y[i], y[k]), (1, z[i], z[k]), (-2, y[i], z[k])):
                gap = (a - b).square().sum()
                distance = gap.sqrt() if gap > 1e-16 else torch.tensor(1e-8, dtype=gap.dtype)
                total = total + factor * torch.exp(-distance / (a.numel() * (t[i] - r[i])))
        losses.append(total / len(mates))
    return weight(objective, t) * torch.stack(losses)


def data_of(seen, size):
    """The rows of the batch in the order in which they are used."""
    labels, x0, groups = seen.trained().labels, seen.batch.x0, len(seen.batch) // size
    return torch.stack(
        [
            x0[i]
            if labels[i] != NULL_LABEL
            else x0[(i // size + i % size) % groups * size + i % size]
            for i in range(len(x0))
        ]
    )


def weight(objective, t):
    """w(t) of the paper, with the slope of the log-SNR by differentiation."""
    t = t.clone().requires_grad_()
    alpha, sigma = objective.path.alpha(t), objective.path.sigma(t)
    lam = 2 * (alpha.log() - sigma.log())
    (slope,) = torch.autograd.grad(lam.sum(), t)
    shape = alpha**objective.a / (alpha**2 + sigma**2)
    return (0.5 * torch.sigmoid(objective.b - lam) * -slope * shape).detach()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_agrees_pair_by_pair(settings):
    objective = MomentMatching(label_dropout=0.3, **settings)
    seen = watch(objective, n=24)
    loss = second_opinion(seen, objective)
    # Times are float32, and a short step from t to m is a difference of them.
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=1e-3, atol=1e-4)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_pairs_of_a_row_with_itself_are_another_loss():
    """The negative control of the test above."""
    objective = MomentMatching(halvings=8)
    seen = watch(objective, n=24)
    wrong = second_opinion(seen, objective, with_itself=False)
    assert float((seen.out.per_sample - wrong).detach().abs().max()) > 0.05
    ours, theirs = seen.gradient(), seen.gradient(wrong)
    assert float((ours - theirs).norm() / theirs.norm()) > 0.1


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=["linear", "trigflow"])
def test_ratio_falls_by_the_same_amount_at_every_time(path):
    objective = MomentMatching(path=path, halvings=10, shortest=0.0)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    m = objective.middle(t, torch.zeros_like(t))
    fall = path.sigma(t) / path.alpha(t) - path.sigma(m) / path.alpha(m)
    top = torch.tensor(objective.t_max, dtype=torch.float64)
    decrement = path.sigma(top) / path.alpha(top) / 2**10
    # 0.16 on the linear path and 0.10 on the other, so that at t = 0.1 m is 0 there.
    reached = m > 0
    assert int(reached.sum()) >= 8
    torch.testing.assert_close(fall[reached], decrement.expand(9)[reached], rtol=1e-9, atol=1e-12)


def test_middle_time_is_between_r_and_t():
    objective = MomentMatching(halvings=12)
    t, r = torch.tensor([0.9939, 0.5, 0.5]), torch.tensor([0.0, 0.499, 0.0])
    m = objective.middle(t, r)
    assert float(t[0] - m[0]) == pytest.approx(1e-4, abs=1e-7)  # the shortest; it would be 1e-6
    assert float(m[1]) == pytest.approx(0.499)
    assert 0.48 < float(m[2]) < 0.5


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=["linear", "trigflow"])
@pytest.mark.parametrize("a", [1.0, 2.0])
def test_weight_is_that_of_the_paper_and_finite_at_the_data(path, a):
    objective = MomentMatching(path=path, a=a)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(objective.weight_at(t), weight(objective, t))
    assert objective.weight_at(torch.zeros(1)).tolist() == [0.0]


def test_rows_without_label_are_draws_of_all_data():
    """Each in a group has data of another label, and the rest have their own."""
    objective = MomentMatching(group=4, label_dropout=0.5)
    seen = watch(objective, n=32)
    call, x0 = seen.trained(), seen.batch.x0
    x1 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=x0.dtype)
    used = (call.x - call.t[:, None] * x1) / (1 - call.t[:, None])
    source = torch.cdist(used, x0).argmin(1)
    torch.testing.assert_close(used, x0[source], rtol=1e-4, atol=1e-4)
    dropped = call.labels == NULL_LABEL
    assert source[~dropped].tolist() == torch.arange(32)[~dropped].tolist()
    assert int(dropped.sum()) > 8
    for group in range(8):
        homes = [int(source[i]) // 4 for i in range(4 * group, 4 * group + 4) if dropped[i]]
        assert len(set(homes)) == len(homes)


def test_rows_of_a_group_share_their_times():
    seen = watch(MomentMatching(group=4), n=24)
    assert seen.out.t.view(-1, 4).unique(dim=1).shape == (6, 1)
    assert len(seen.out.t.unique()) == len(seen.out.r.unique()) == 6


right = moment_matching.kernel_distance


def towards_zero(y, z, width, *, with_itself):
    at_zero = right(y, torch.zeros_like(z), width, with_itself=with_itself)
    return at_zero + right(y, z, width, with_itself=with_itself)


MISTAKES = {
    "sign": ("pulled", lambda *a, **how: -right(*a, **how)),
    "towards_zero": ("gaussian", towards_zero),
}
CLAIMS = {"gaussian": fixed_point.at_gaussian, "pulled": fixed_point.pulled_back}


@pytest.mark.parametrize(("claim", "mistake"), MISTAKES.values(), ids=MISTAKES)
def test_wrong_distance_is_rejected(claim, mistake, monkeypatch):
    monkeypatch.setattr(moment_matching, "kernel_distance", mistake)
    result = run_claim(claim, CLAIMS[claim], Subject("moment_matching", MomentMatching))
    assert result.status == "FAIL", result.figure


def test_pairs_of_a_row_with_itself_move_the_optimum():
    class WithItself(MomentMatching):
        exact_with: ClassVar = {"halvings": 8}

    result = run_claim("gaussian", fixed_point.at_gaussian, Subject("m", WithItself))
    assert result.status == "FAIL", result.figure


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_max": 1.0}, "sigma / alpha has no bound at t = 1"),
        ({"t_min": 0.5, "t_max": 0.4}, "t_min = 0.5 and t_max = 0.4"),
        ({"group": 1, "with_itself": False}, "group = 1 leaves no pair of two rows"),
        ({"times": BetaPair()}, "draws r = t in some rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MomentMatching(**settings)
