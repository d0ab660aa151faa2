"""alpha-Flow: its loss computed a second time, its curriculum, and both of its limits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from objective_cases import noise_of, watch

from registry.protocols import NULL_LABEL
from zoo.objectives.alpha_flow import AlphaFlow
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import like, mean_flat
from zoo.oracles import identities
from zoo.points.velocities import Own
from zoo.schedules import sigmoid_ramp
from zoo.times import LogitNormalPair, UniformPair
from zoo.weighting import Adaptive, Unweighted

HALF = LogitNormalPair(off_diagonal_fraction=0.5)


def constant(share, **settings):
    return AlphaFlow(first_share=share, last_share=share, **settings)


def second_opinion(seen, objective, a, k, omega=1.0, kappa=0.0):
    """The published target of two steps, or with the derivative, in the published loss."""
    call, x0 = seen.trained(), seen.batch.x0
    x, t, r, label = call.x, call.t.double(), call.r.double(), call.labels
    v_c = noise_of(call.x, call.t, x0) - x0

    def u(x, t, r, label=label):
        return seen.net(x, t, r, {"label": label})["u"]

    null = u(x, t, t, torch.full_like(label, NULL_LABEL))
    guided = omega * v_c + (1 - omega - kappa) * null + kappa * u(x, t, t)
    v = torch.where((label == NULL_LABEL)[:, None], v_c, guided).detach()
    w = u(x, t, t).detach() if isinstance(objective.velocity, Own) else v
    if a == 0:
        _, du = torch.func.jvp(u, (x, t, r), (w, torch.ones_like(t), 0 * r))
        target, factor = w - like(t - r, x) * du, 1.0
    else:
        s = a * r + (1 - a) * t
        if objective.own_first_step:
            w = u(x, t, s).detach()
        z = x - like(t - s, x) * w
        target, factor = a * w + (1 - a) * u(z, s, r), a
        target = target.clamp(-objective.clip, objective.clip)
    target = torch.cat([target[:k], v[k:]]).detach()
    e = (u(x, t, r) - target).square().mean(1)
    factor = torch.cat([torch.full((k,), factor), torch.ones(len(x) - k)]).double()
    if isinstance(objective.weight, Unweighted):
        return e / factor
    return factor * e / (e.detach() + 1e-3)


CASES = {
    "derivative": (0.0, {}),
    "middle": (0.3, {}),
    "clipped": (0.3, {"clip": 0.2}),
    "flow": (1.0, {}),
    "own_first_step": (0.5, {"own_first_step": True}),
    "guided": (0.3, {"omega": 0.3, "kappa": 0.5}),
    "guided_derivative": (0.0, {"omega": 0.3, "kappa": 0.5}),
    "own": (0.3, {"velocity": Own()}),
    "unweighted": (0.3, {"weight": Unweighted()}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_agrees_row_by_row(name):
    a, settings = CASES[name]
    objective = constant(a, times=HALF, label_dropout=0.3, **settings)
    seen = watch(objective, n=24)
    loss = second_opinion(seen, objective, a, 12, objective.omega, objective.kappa)
    # Times are float32, and differences of them divide.
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=1e-4, atol=1e-5)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert 0 < (seen.trained().labels == NULL_LABEL).sum() < 24


@pytest.mark.parametrize("other", [0.25, 0.35])
def test_another_share_is_another_gradient(other):
    """The negative control of the test above."""
    objective = constant(0.3, times=HALF, weight=Unweighted())
    seen = watch(objective, n=24)
    wrong = second_opinion(seen, objective, other, 12)
    assert not torch.allclose(seen.out.per_sample[:12], wrong[:12], rtol=0.02)


def gradient(objective, n=64):
    return watch(objective, n=n, labels="none").gradient()


ALL = {"times": UniformPair(off_diagonal_fraction=1.0), "weight": Unweighted()}


def test_gradient_tends_to_that_of_mean_flow_with_the_share():
    """At rate O(a): halving the share halves the difference. MeanFlow's error is a sum over two."""
    limit = gradient(MeanFlow(**ALL)) / 2
    off = [float((gradient(constant(a, snap=0.0, **ALL)) - limit).norm()) for a in (0.04, 0.02)]
    assert off[0] / off[1] == pytest.approx(2, abs=0.2)
    assert off[1] < 0.1 * float(limit.norm())
    torch.testing.assert_close(gradient(constant(0.0, **ALL)), limit, rtol=1e-9, atol=1e-9)


def test_without_the_factor_the_gradient_vanishes_with_the_share():
    """The negative control: it falls as a, to 1 % at a = 0.01, where ours stays."""
    limit = float(gradient(MeanFlow(**ALL)).norm()) / 2
    for a in (0.1, 0.01):
        seen = watch(constant(a, **ALL), n=64, labels="none")
        ours = float(seen.gradient().norm())
        assert 0.5 * limit < ours < 2 * limit
        again = watch(constant(a, **ALL), n=64, labels="none")
        assert float(again.gradient(a * again.out.per_sample).norm()) < 2 * a * limit


def test_target_with_its_own_first_step_of_one_half_is_shortcuts():
    """The identity of zoo/oracles, which is Shortcut's; with the velocity's it is another one."""
    objective = constant(0.5, own_first_step=True, **ALL)
    seen = watch(objective, n=12, labels="none")
    call = seen.trained()
    at = call.x, call.t.double(), call.r.double()
    wanted = identities.shortcut(seen.net, *at)
    torch.testing.assert_close(seen.out.per_sample, 2 * mean_flat(wanted**2), rtol=1e-5, atol=1e-7)
    other = watch(constant(0.5, **ALL), n=12, labels="none")
    assert not torch.allclose(other.out.per_sample, seen.out.per_sample, rtol=0.05)


def test_share_falls_over_the_ramp_and_is_cut_at_both_ends():
    objective = AlphaFlow(ramp=(0.2, 0.6))
    shares = [objective.share(p) for p in (0.0, 0.2, 0.4, 0.42, 0.6, 1.0)]
    assert shares == pytest.approx([1, 1, 0.5, 1 - 1 / (1 + math.exp(-25 * 0.05)), 0, 0])
    falls = [objective.share(p / 100) for p in range(101)]
    assert all(after <= before for before, after in pairwise(falls))
    cut = {share for share in falls if not 0.005 <= share <= 0.995}
    assert cut == {0.0, 1.0}
    assert AlphaFlow(ramp=(0.5, 0.5)).share(0.49) == 1 - AlphaFlow(ramp=(0.5, 0.5)).share(0.5) == 1


def test_ramp_is_zero_before_and_one_after():
    assert [sigmoid_ramp(p, (0.0, 0.5), 4.0) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert sigmoid_ramp(0.125, (0.0, 0.5), 4.0) == pytest.approx(1 / (1 + math.e))


def test_branches_ask_the_network_as_seldom_as_they_can():
    """One call for each row with a gradient; one more of the u rows for a target of two steps."""
    for a, rows in ((1.0, [16]), (0.5, [16, 12]), (0.0, [12, 4])):
        seen = watch(constant(a, label_dropout=0.0), n=16)
        assert [len(call.x) for call in seen.calls] == rows


def test_adaptive_weight_of_another_power_keeps_the_scale():
    """a^(2 q - 1): where the error is large beside the offset, halving a changes no gradient."""
    for power in (0.0, 0.5, 1.0):
        weight = Adaptive(power=power, offset=1e-12)
        one, half = (
            watch(constant(a, times=ALL["times"], weight=weight), labels="none")
            for a in (1e-2, 5e-3)
        )
        ratio = float(one.gradient().norm() / half.gradient().norm())
        assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_share": 1.5}, "alpha_flow.first_share = 1.5 is not a fraction"),
        ({"snap": -0.1}, "alpha_flow.snap = -0.1 is not a fraction"),
        ({"ramp": (0.5, 0.2)}, "alpha_flow.ramp"),
        ({"kappa": 1.0}, r"alpha_flow.kappa = 1.0 must lie in \[0, 1\)"),
        (
            {"velocity": Own(), "times": UniformPair(off_diagonal_fraction=1.0)},
            "alpha_flow does not have both",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AlphaFlow(**settings)
