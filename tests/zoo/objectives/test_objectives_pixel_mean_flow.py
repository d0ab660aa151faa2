"""Pixel MeanFlow: its loss computed a second time, its bound on t, and its features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance.subject import GAUSSIAN, law_batch
from zoo.features import RandomConvolutions, RawValues
from zoo.objectives.improved_mean_flow import ImprovedMeanFlow
from zoo.objectives.pixel_mean_flow import PixelMeanFlow
from zoo.ops import like
from zoo.times import TwoLogitNormals, UniformPair
from zoo.weighting import Unweighted

HALF = UniformPair(off_diagonal_fraction=0.5)


def second_opinion(seen, objective, bound=None):
    """|| V - v ||^2, || v - v ||^2 and, where t is small, the features of x_t - t u."""
    call, x0 = seen.trained(), seen.batch.x0
    x, t, r, cond = call.x, call.t.double(), call.r.double(), {"label": call.labels}
    x1 = noise_of(call.x, call.t, x0)
    x_t = like(1 - t, x) * x0 + like(t, x) * x1
    v_c = (x_t - x0) / like(t.clamp(min=objective.t_min if bound is None else bound), x)

    def u(x, t, r):
        return seen.net(x, t, r, cond)["u"]

    along = seen.net(x, t, t, cond)["v"].detach()
    value, du_dt = torch.func.jvp(u, (x, t, r), (along, torch.ones_like(t), 0 * r))
    V = value + like(t - r, x) * du_dt.detach()
    squares = [(p - v_c).square().flatten(1).sum(1) for p in (V, seen.net(x, t, r, cond)["v"])]
    losses = sum(error / (error.detach() + 0.01) for error in squares)
    if objective.features is not None:
        predicted = objective.features(x - like(t, x) * value)
        error = (predicted - objective.features(x0)).square().sum(1)
        error = torch.where(t < objective.features_below, error, 0)
        losses = losses + objective.features_scale * error / (error.detach() + 0.01)
    return losses


@pytest.mark.parametrize(
    "settings",
    [{}, {"t_min": 0.6}, {"features": RawValues(), "features_below": 0.5, "features_scale": 0.3}],
    ids=["default", "large t_min", "features"],
)
def test_loss_is_the_published_one(settings):
    objective = PixelMeanFlow(times=HALF, label_dropout=0.4, **settings)
    seen = watch(objective, n=24)
    seen.agrees(second_opinion(seen, objective))


def test_another_bound_is_another_loss():
    """The negative control: many rows of this law have t below 0.6."""
    objective = PixelMeanFlow(times=HALF, t_min=0.6)
    seen = watch(objective, n=24)
    ours, theirs = seen.gradient(), seen.gradient(second_opinion(seen, objective, bound=0.05))
    assert float((ours - theirs).norm() / ours.norm()) > 0.02


def test_features_have_a_gradient_to_the_prediction_and_leave_later_rows_alone():
    made = {
        name: watch(PixelMeanFlow(times=HALF, features_below=below, features=features), n=24)
        for name, below, features in (
            ("with", 0.5, RawValues()), ("never", 0.0, RawValues()), ("without", 0.5, None)
        )
    }  # fmt: skip
    assert made["never"].out.per_sample.equal(made["without"].out.per_sample)
    changed = made["with"].out.per_sample != made["without"].out.per_sample
    assert changed.equal(made["with"].out.t < 0.5)
    assert not torch.allclose(made["with"].gradient(), made["without"].gradient(), rtol=1e-3)


def test_features_of_pictures_are_those_of_the_predicted_picture():
    features = RandomConvolutions(widths=(4,))
    features.feature_net.double()  # as the watched network
    objective = PixelMeanFlow(features=features, times=HALF)
    seen = watch(objective, shape=(3, 8, 8), n=4)
    assert seen.out.terms["features"].shape == (4,)
    assert seen.gradient().isfinite().all()


def test_without_a_bound_and_features_it_is_improved_mean_flow():
    ours = watch(PixelMeanFlow(times=HALF, t_min=0.0), n=24)
    assert ours.out.per_sample.equal(watch(ImprovedMeanFlow(times=HALF), n=24).out.per_sample)


def test_velocity_is_biased_below_the_bound_alone():
    """At the true map the mean of x_1 - x_0 - v is zero, and that of the bounded one is not."""
    batch = law_batch(GAUSSIAN, 20_000, 0)
    law = TwoLogitNormals(diagonal_mean=-1.0, off_diagonal_fraction=0.0)
    objective = PixelMeanFlow(
        weight_u=Unweighted(), weight_v=Unweighted(), times=law, t_min=0.3, label_dropout=0.0
    )
    found = {
        t_min: replace(objective, t_min=t_min).loss(
            GAUSSIAN, batch, torch.Generator().manual_seed(0)
        )
        for t_min in (0.0, 0.3)
    }
    above = found[0.0].t >= 0.3
    excess = (found[0.3].per_sample - found[0.0].per_sample).detach()
    assert excess[above].abs().max() == 0
    assert (excess[~above] != 0).all()


def test_defaults_are_those_of_the_released_code_for_patches_of_16():
    times = PixelMeanFlow().times
    assert {times.t_mean, times.r_mean, times.diagonal_mean} == {0.8}
    assert {times.t_std, times.r_std, times.diagonal_std} == {0.8}
    assert (times.off_diagonal_fraction, times.pairing) == (0.5, "sorted")
    assert (PixelMeanFlow().t_min, PixelMeanFlow().features_below) == (0.05, 0.8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_min": 1.5}, "pixel_mean_flow.t_min = 1.5 is not a fraction"),
        ({"features_below": -0.1}, "pixel_mean_flow.features_below = -0.1 is not a fraction"),
        ({"features_scale": -1.0}, "pixel_mean_flow.features_scale = -1.0 must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PixelMeanFlow(**settings)
