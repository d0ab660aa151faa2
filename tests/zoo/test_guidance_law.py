"""A drawn guidance: what targets and samplers ask, and that training has its answer.

The network is an oracle of two Gaussian classes under guidance: its velocity is guided inside the
interval that it is told, and its map integrates that velocity. At r = t it knows the interval
[0, 1] alone, as a network does that was trained so; asked about another one there, it answers 0.
"""

from __future__ import annotations

import pytest
import torch

from registry.protocols import NULL_LABEL, Batch
from zoo import guidance
from zoo.derivatives.methods import Jvp
from zoo.guidance import (
    LogUniformGuidance,
    UniformGuidance,
    guided_target,
    on_diagonal,
    unguided,
    unlabelled,
)
from zoo.objectives.dumo import DuMo
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.terminal_velocity import TerminalVelocity
from zoo.ops import like
from zoo.residuals import Exact
from zoo.samplers import Euler, Heun, InputGuidance
from zoo.teachers import Online
from zoo.times import BetaPair, UniformPair
from zoo.weighting import Unweighted

F64 = torch.float64
MEANS, STD, NULL_STD = torch.tensor([-1.0, 1.5, 0.0], dtype=F64), 0.6, 1.4


def velocity(x, t, label, scale):
    """The velocity of the label's Gaussian, guided against that of the unlabelled one."""
    given = _gaussian(x, t, MEANS[label][:, None], STD)
    null = _gaussian(x, t, MEANS[2], NULL_STD)
    return torch.where(like(label == NULL_LABEL, x), null, null + scale[:, None] * (given - null))


def _gaussian(x, t, mean, std):
    t = t[:, None]
    slope = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
    return -mean + slope * (x - (1 - t) * mean)


def exact(x, t, r, cond):
    """The map and the velocity for each row's own guidance, but for what is never trained."""
    scale, low, high = cond["guidance"].to(F64).unbind(1)
    label = cond["label"]
    known = (r < t) | ((low == 0) & (high == 1))
    v = velocity(x, t, label, torch.where((low <= t) & (t <= high), scale, 1))
    # The velocity jumps at both ends of the interval, so each part is integrated by itself.
    state, time = x, t
    for end, w in ((high, torch.ones_like(scale)), (low, scale), (0 * low, torch.ones_like(scale))):
        stop = torch.minimum(time, torch.maximum(end, r))
        state, time = _integrated(state, time, stop, label, w), stop
    gap = (t - r)[:, None]
    average = torch.where(gap > 0, (x - state) / torch.where(gap > 0, gap, 1), v)
    return {key: torch.where(known[:, None], out, 0) for key, out in (("u", average), ("v", v))}


def _integrated(x, start, stop, label, scale, steps=3):
    """Runge and Kutta's method of fourth order."""
    h = (start - stop) / steps
    for i in range(steps):
        t = start - i * h

        def slope(x, back, t=t):
            return velocity(x, t - back * h, label, scale)

        one = slope(x, 0)
        two = slope(x - h[:, None] / 2 * one, 0.5)
        three = slope(x - h[:, None] / 2 * two, 0.5)
        four = slope(x - h[:, None] * three, 1)
        x = x - h[:, None] / 6 * (one + 2 * two + 2 * three + four)
    return x


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of_both_classes(n):
    label = torch.randint(2, (n,), generator=rng(1))
    x0 = MEANS[label][:, None] + STD * torch.randn(n, 1, generator=rng(2), dtype=F64)
    return Batch(x0=x0, cond={"label": label})


def pull(objective, key, n=1000):
    """How far the loss pulls the exact output away, in standard errors, and the loss itself."""
    leaf = torch.zeros(n, 1, dtype=F64, requires_grad=True)

    def net(x, t, r, cond):
        out = exact(x, t, r, cond)
        return {**out, key: out[key] + leaf} if torch.is_grad_enabled() and len(x) == n else out

    batch = rows_of_both_classes(n)
    out = objective.loss(net, batch, rng())
    (slope,) = torch.autograd.grad(out.per_sample.sum(), leaf)
    # Guidance moves the two classes to opposite sides, so each is judged by itself.
    groups = [slope[batch.cond["label"] == label] for label in (0, 1)]
    return max(abs(float(g.mean() / g.std() * len(g) ** 0.5)) for g in groups), out


MEAN_FLOW = MeanFlow(
    guidance=LogUniformGuidance(),
    times=UniformPair(off_diagonal_fraction=0.5),
    weight=Unweighted(),
    derivative=Jvp(),
    label_dropout=0.0,
)
DUMO = DuMo(
    guidance=LogUniformGuidance(),
    times=BetaPair(off_diagonal_fraction=0.5),
    residual=Exact(derivative=Jvp()),
    teacher=Online(),
    label_dropout=0.0,
)
BOTH = [pytest.param(MEAN_FLOW, "u", id="mean_flow"), pytest.param(DUMO, "v", id="dumo")]


@pytest.mark.parametrize(("objective", "key"), BOTH)
def test_guided_network_is_the_fixed_point_of_a_drawn_guidance(objective, key):
    z, _ = pull(objective, key)
    assert z < 4


@pytest.mark.parametrize(("objective", "key"), BOTH)
def test_fixed_point_is_lost_where_targets_ask_with_each_row_s_interval(
    objective, key, monkeypatch
):
    """At r = t those were never trained, so that targets are made of noise."""
    monkeypatch.setattr(guidance, "on_diagonal", lambda cond, t: cond)
    assert pull(objective, key)[0] > 5


@pytest.mark.parametrize(("objective", "key"), BOTH)
def test_fixed_point_has_no_other_scale(objective, key, monkeypatch):
    for module in ("mean_flow", "dumo"):
        monkeypatch.setattr(f"zoo.objectives.{module}.guidance_share", lambda cond, t: 0 * t)
    assert pull(objective, key)[0] > 5


TVM = TerminalVelocity(
    guidance=UniformGuidance(smallest=1.0, largest=3.0),
    teacher=Online(),
    derivative=Jvp(),
    label_dropout=0.0,
)


def test_guided_network_is_the_fixed_point_of_terminal_velocity_matching(monkeypatch):
    assert pull(TVM, "u")[0] < 4
    module = "zoo.objectives.terminal_velocity"
    monkeypatch.setattr(f"{module}.told_scale", lambda cond: cond["guidance"][:, 0] ** 0)
    assert pull(TVM, "u")[0] > 5


def test_uniform_scales_are_between_their_ends_at_all_times():
    scale, low, high = UniformGuidance(smallest=1.5, largest=4.0)(4000, rng()).unbind(1)
    assert scale.mean() == pytest.approx(2.75, abs=0.05)
    assert (scale.min(), scale.max()) == (pytest.approx(1.5, abs=0.01), pytest.approx(4, abs=0.01))
    assert (low == 0).all()
    assert (high == 1).all()
    assert (UniformGuidance(smallest=2.0, largest=2.0)(9, rng())[:, 0] == 2).all()
    for wrong in ({"smallest": 0.5}, {"smallest": 3.0, "largest": 2.0}):
        with pytest.raises(ValueError, match="needs 1 <= smallest <= largest"):
            UniformGuidance(**wrong)


def test_rows_may_be_left_unguided():
    cond, t = some_guidance()
    rows = t < 0.5
    told = unguided(cond, rows)["guidance"]
    assert (told[rows] == torch.tensor([1.0, 0.0, 1.0])).all()
    assert torch.equal(told[~rows], cond["guidance"][~rows])
    assert unguided(None, rows) is None
    assert unguided({"label": t}, rows) == {"label": t}


def test_exact_map_has_no_residual_for_any_guidance():
    """Row by row, since the velocity head's own direction needs no average over the data.

    Three steps integrate most rows to 1e-5; at large scales near the data they do not.
    """
    assert pull(DUMO, "v")[1].diagnostics["residual_rms"].quantile(0.75) < 1e-3


def some_guidance(n=64):
    cond = {"label": torch.arange(n) % 2, "guidance": LogUniformGuidance()(n, rng(3))}
    return cond, torch.rand(n, generator=rng(4))


def test_question_on_the_diagonal_names_the_whole_interval_and_the_scale_of_its_time():
    cond, t = some_guidance()
    scale, low, high = cond["guidance"].unbind(1)
    told = on_diagonal(cond, t)
    within = (low <= t) & (t <= high)
    assert 0 < within.sum() < 64
    assert (told["guidance"][:, 1:] == torch.tensor([0.0, 1.0])).all()
    assert torch.equal(told["guidance"][:, 0], torch.where(within, scale, 1))
    assert torch.equal(told["label"], cond["label"])
    assert on_diagonal(None, t) is None
    assert on_diagonal({"label": cond["label"]}, t) == {"label": cond["label"]}


def test_target_asks_for_the_row_s_scale_and_without_a_label_for_scale_one():
    cond, t = some_guidance()
    heard = []

    def net(x, t, r, cond):
        heard.append(cond)
        return {"v": x}

    x = torch.zeros(64, 1)
    guided_target(x, net, x, t, cond, t >= 0, guidance.guidance_share(cond, t))
    given, null = heard
    assert torch.equal(given["guidance"], on_diagonal(cond, t)["guidance"])
    assert (null["label"] == NULL_LABEL).all()
    assert (null["guidance"] == torch.tensor([1.0, 0.0, 1.0])).all()
    assert torch.equal(cond["guidance"], some_guidance()[0]["guidance"])  # the rows keep theirs
    assert "guidance" not in unlabelled({"label": cond["label"]})


@pytest.mark.parametrize("method", [Euler(shift=2.0), Heun()])
def test_velocity_sampler_asks_a_told_network_what_it_was_trained_on(method):
    """Samples follow the velocity that is guided inside the interval, and is plain outside."""
    label, x1 = torch.arange(8) % 2, torch.randn(8, 1, generator=rng(5), dtype=F64)
    sampler = InputGuidance(nfe=20, scale=3.0, interval=(0.3, 0.8), sampler=method)
    found = sampler(exact, x1, {"label": label}, rng())

    def field(x, t, r, cond):
        within = (t >= 0.3) & (t <= 0.8)
        return {"v": velocity(x, t, label, torch.where(within, 3.0, 1.0).to(F64))}

    alone = InputGuidance(nfe=20, sampler=method).inner()
    torch.testing.assert_close(found, alone(field, x1, {"label": label}, rng()))
    unguided = alone(lambda x, t, r, cond: {"v": velocity(x, t, label, 0 * t + 1)}, x1, None, rng())
    assert (found - unguided).abs().max() > 0.1
