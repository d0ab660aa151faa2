"""TwinFlow: its loss computed a second time, the sign of its correction, and its quarters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import CLOSE, noise_of, watch

from benchmarks.conformance.networks import ExactNetwork, Shifted, Toy
from benchmarks.conformance.subject import GAUSSIAN, law_batch
from registry.protocols import NULL_LABEL, Share
from zoo.objectives.twin_flow import TwinFlow
from zoo.ops import like, normal_like
from zoo.points.draws import draw
from zoo.residuals import Rcgm
from zoo.times import BetaPair, Quarters, UniformPair, uniform_draws
from zoo.weighting import Unweighted

N = 32
QUARTER = N // 4


def weighted(error):
    return error / (error.detach() + 1e-6).sqrt()


def target_error(u, correction):
    return (u - (u - correction.clamp(-1, 1)).detach()).square().mean(1)


def recursive_loss(seen, call, objective, teacher):
    """RCGM's loss of the rows with r < t, with the steps of the average one after the other."""
    x, t, r, label = call.x, call.t.double(), call.r.double(), call.labels

    def u(net, x, t, r, label=label):
        return net(x, t, r, {"label": label})["u"]

    x0 = seen.batch.x0[: len(x)]
    v = noise_of(call.x, call.t, x0) - x0
    if objective.omega:
        null = u(teacher, x, t, t, torch.full_like(label, NULL_LABEL))
        guided = v + objective.omega * (u(teacher, x, t, t) - null)
        v = torch.where((label != NULL_LABEL)[:, None], guided, v)
    m = torch.maximum(t - objective.residual.delta, r)
    z, total, order = x - like(t - m, x) * v, 0.0, objective.residual.order
    for j in range(order):
        start, end = m + (r - m) * j / order, m + (r - m) * (j + 1) / order
        step = like(start - end, x) * u(teacher, z, start, end)
        total, z = total + step, z - step
    out = u(seen.net, x, t, r)
    g = (like(t - r, x) * out - total) / like(t - m, x) - v
    factor = 1 + torch.tan((1 - t + r) * math.pi / 2.5)
    return factor * weighted(target_error(out, g)), out


def second_opinion(seen, objective, teacher, sign=1.0):
    """The kinds of rows one after the other; `sign` is that of the difference of velocities."""
    base, between, generated, twin = seen.calls
    losses, out = recursive_loss(seen, base, objective, teacher)

    # What the twin says minus what u says, between samples of one step and noise.
    u = out[: len(between.x)]
    at_s = seen.net(between.x, between.t, between.t, {"label": base.labels[: len(u)]})
    e = sign * (at_s["twin"] - at_s["u"]).detach()
    rectify = 0.5 * 4 * weighted(target_error(u, e))
    losses = torch.cat([losses[: len(u)] + rectify, losses[len(u) :]])

    label = {"label": twin.labels}
    x = generated.x - seen.net(generated.x, generated.t, generated.r, label)["u"].detach()
    made = seen.net(twin.x, twin.t, twin.t, label)["twin"]
    flow = noise_of(twin.x, twin.t, x) - x
    return torch.cat([losses, weighted((made - flow).square().mean(1))])


def watched(**settings):
    objective = TwinFlow(label_dropout=0.3, **settings)
    objective.teacher.attach(teacher := Toy((2,), ("u",), seed=5))
    return watch(objective, n=N), objective, teacher


@pytest.mark.parametrize(
    "settings",
    [{}, {"residual": Rcgm(order=1, delta=0.3)}, {"residual": Rcgm(order=4), "omega": 0.5}],
    ids=["default", "order_1", "order_4_guided"],
)
def test_loss_agrees_row_by_row(settings):
    seen, objective, teacher = watched(**settings)
    loss = second_opinion(seen, objective, teacher)
    # Dividing by delta = 0.01 turns float32 times into errors of 1e-5.
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=1e-4, atol=1e-4)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_correction_of_the_other_sign_is_another_gradient():
    """The negative control: a squared error alone does not show the sign."""
    seen, objective, teacher = watched()
    wrong = second_opinion(seen, objective, teacher, sign=-1.0)
    torch.testing.assert_close(seen.out.per_sample, wrong, rtol=1e-4, atol=1e-4)
    ours, theirs = seen.gradient(), seen.gradient(wrong)
    assert float((ours - theirs).norm() / ours.norm()) > 0.05


def test_rows_are_asked_where_the_method_says():
    """Velocities between samples of one step and fresh noise, the twin between others and noise."""
    seen, _, _ = watched()
    base, between, generated, twin = seen.calls
    x0 = seen.batch.x0
    assert [len(call.x) for call in seen.calls] == [3 * QUARTER, QUARTER, QUARTER, QUARTER]
    assert [call.with_gradient for call in seen.calls] == [True, False, False, True]
    assert between.t.equal(between.r)
    assert twin.t.equal(twin.r)
    assert between.labels.equal(base.labels[:QUARTER])
    assert generated.labels.equal(twin.labels)
    # The draws again, in their order: noise, times and labels of the batch, then these two.
    objective, rng = TwinFlow(label_dropout=0.3), torch.Generator().manual_seed(0)
    d = draw(seen.batch, rng, objective.path, objective.times, 0.3)
    noise, s = normal_like(x0, rng), uniform_draws(N, rng)
    u = seen.net(base.x, base.t, base.r, {"label": base.labels})["u"].detach()[:QUARTER]
    x = base.x[:QUARTER] - u
    assert base.x[:QUARTER].equal(d.x1[:QUARTER])  # t = 1
    assert between.t.equal(s[:QUARTER])
    torch.testing.assert_close(between.x, x + like(s[:QUARTER], x) * (noise[:QUARTER] - x), **CLOSE)
    last = slice(3 * QUARTER, N)
    assert generated.x.equal(noise[last])
    assert generated.t.eq(1).all()
    assert generated.r.eq(0).all()
    made = seen.net(generated.x, generated.t, generated.r, {"label": generated.labels})["u"]
    x = (generated.x - made).detach()
    assert twin.t.equal(d.t[last])
    torch.testing.assert_close(twin.x, x + like(d.t[last], x) * (d.x1[last] - x), **CLOSE)


@pytest.mark.parametrize("eps", [0.2, -0.2])
def test_u_falls_where_the_velocity_of_samples_is_too_large(eps):
    """At the exact solution a twin off by eps pushes u of the one-step rows down by it."""
    net = Shifted(ExactNetwork(GAUSSIAN, ("u", "twin"), {"u": "u", "twin": "v"}), "twin", eps)
    probe = Shifted(net, "u", 0.0)
    net.everywhere = True
    objective = TwinFlow(weight=Unweighted(), clip=0.0, rectify_weight=0.7)
    objective.teacher.attach(net)
    batch = law_batch(GAUSSIAN, 64, 0)
    out = objective.loss(probe, batch, torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(out.per_sample.mean(), [probe.bias])
    # Of 0.7 || u - sg[u - eps] ||^2, in the mean over the one-step rows.
    assert float(slope) == pytest.approx(0.7 * 2 * eps, rel=1e-4)


def test_mean_of_the_correction_is_over_the_one_step_rows():
    """With any number of rows, and of a batch that is shared out."""
    for n in (5, 8, 21):
        objective = TwinFlow(clip=0.0, weight=Unweighted())
        objective.teacher.attach(teacher := Toy((2,), ("u",), seed=5))
        seen = watch(objective, n=n)
        terms, num = seen.out.terms["rectify"], objective.times.num_one_step(n)
        assert len(terms) == num
        twin = float(seen.out.terms["twin"].sum())
        total = float(seen.out.per_sample.detach().sum())
        assert total == pytest.approx(0.5 * n * float(terms.mean()) + twin)
        for number in (0, 1):
            share = Share(number, 2)
            part = objective.loss(
                seen.net, replace(seen.batch, share=share), torch.Generator().manual_seed(0)
            )
            (wanted,) = share.rows(seen.out.per_sample)
            torch.testing.assert_close(part.per_sample, wanted, **CLOSE)
        assert teacher is objective.teacher.network


def test_quarters_have_their_steps():
    law, n = Quarters(), 40_000
    t, r = law(n, torch.Generator().manual_seed(0))
    one, short, far, none = t.view(4, -1)
    gaps = (t - r).view(4, -1)
    assert (one == 1).all()
    assert (r[: n // 4] == 0).all()
    assert (gaps[3] == 0).all()
    assert (gaps[1] <= 0.05 * short + 1e-7).all()
    for times in (short, far, none):  # uniform, and steps uniform in their shares of t
        assert abs(float(times.mean()) - 0.5) < 4 * (1 / 12 / len(times)) ** 0.5
    for shares in (gaps[1] / short / 0.05, gaps[2] / far):
        assert abs(float(shares.mean()) - 0.5) < 4 * (1 / 12 / len(shares)) ** 0.5
    assert [law.num_one_step(m) for m in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert [law.num_off_diagonal(m) for m in (1, 4, 5, 8)] == [1, 3, 4, 6]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TwinFlow(times=UniformPair()),
            r"twin_flow.times = @uniform_pair\(\) does not say",
        ),
        (lambda: TwinFlow(omega=1.0), r"twin_flow.omega = 1.0 must lie in \[0, 1\)"),
        (lambda: Quarters(shortening=0.0), r"quarters.shortening = 0.0 must lie in \(0, 1\]"),
        (lambda: Quarters(times=BetaPair()), r"quarters.times = @beta_pair\(\) must draw r < t"),
        (
            lambda: Quarters(times=BetaPair(off_diagonal_fraction=1.0, r_law="zero")),
            r"quarters.times = @beta_pair\(\) must draw r < t in every row, and r > 0",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
