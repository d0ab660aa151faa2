"""Guidance: label dropout, guided velocities and targets, and their effective scales.

The scales of whole objectives are in their own tests; here is the algebra, on a class-conditional
mixture whose velocities are exact with and without labels.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.conformance.networks import Tapped, Toy
from benchmarks.conformance.subject import MIXTURE, law_batch
from registry.protocols import NULL_LABEL
from zoo.guidance import (
    check_interval,
    drop_labels,
    guidance_direction,
    guided_target,
    guided_velocity,
    inside,
    limit_norm,
    unlabelled,
    velocity_at,
    velocity_of,
)
from zoo.ops import like, normal_like, rms

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def states(n=64):
    """x_t on the path, with labels."""
    batch, t = law_batch(MIXTURE, n, 0), torch.rand(n, generator=rng(), dtype=F64)
    x = like(1 - t, batch.x0) * batch.x0 + like(t, batch.x0) * normal_like(batch.x0, rng(1))
    return x, t, batch.cond


@settings(max_examples=20)
@given(n=st.integers(1, 50), rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 99))
def test_dropped_labels_are_null_and_the_mask_marks_the_others(n, rate, seed):
    label = torch.randint(5, (n,), generator=rng(seed))
    label[::7] = NULL_LABEL
    cond, labelled = drop_labels({"label": label, "text": label}, rate, rng(seed), n)
    kept = cond["label"] != NULL_LABEL
    assert torch.equal(kept, labelled)
    assert torch.equal(cond["label"][kept], label[kept])
    assert torch.equal(cond["text"], label)  # nothing else is touched
    if rate == 0:
        assert torch.equal(cond["label"], label)
    if rate == 1:
        assert not labelled.any()


def test_labels_are_dropped_at_the_stated_rate_and_the_originals_stay():
    label = torch.zeros(20_000, dtype=torch.int64)
    cond, labelled = drop_labels({"label": label}, 0.1, rng(), 20_000)
    assert abs(float(labelled.double().mean()) - 0.9) < 4 * (0.09 / 20_000) ** 0.5
    assert not label.any()
    assert cond["label"].dtype == torch.int64


@pytest.mark.parametrize("cond", [None, {"text": torch.zeros(3)}])
def test_data_without_labels_have_none_to_drop(cond):
    kept, labelled = drop_labels(cond, 0.5, rng(), 3)
    assert kept is cond
    assert not labelled.any()
    with pytest.raises(ValueError, match="labels"):
        unlabelled(cond)


def test_unlabelled_drops_every_label_and_keeps_the_rest():
    cond = {"label": torch.tensor([3, NULL_LABEL]), "text": torch.ones(2)}
    assert unlabelled(cond)["label"].tolist() == [NULL_LABEL, NULL_LABEL]
    assert unlabelled(cond)["text"] is cond["text"]
    assert cond["label"].tolist() == [3, NULL_LABEL]


def test_velocity_is_v_and_else_u_on_the_diagonal():
    both, (x, t, cond) = Tapped(Toy((2,), ("u", "v")), 64), states()
    assert torch.equal(velocity_at(both, x, t, cond), both(x, t, t, cond)["v"])
    assert torch.equal(both.calls[0].r, both.calls[0].t)
    assert velocity_of({"u": 1}) == 1
    assert velocity_of({"u": 1, "v": 2}) == 2


def test_direction_points_from_no_label_to_the_label():
    x, t, cond = states()
    wanted = MIXTURE.velocity(x, t, cond) - MIXTURE.velocity(x, t)
    torch.testing.assert_close(guidance_direction(MIXTURE, x, t, cond), wanted)


@pytest.mark.parametrize("scale", [1.0, 1.75, 4.0])
def test_guided_velocity_has_its_scale(scale):
    """null + w (given - null), and one evaluation only where w = 1."""
    x, t, cond = states()
    null, given_ = MIXTURE.velocity(x, t), MIXTURE.velocity(x, t, cond)
    net = Tapped(MIXTURE, 64)
    guided = guided_velocity(net, x, t, cond, scale)
    torch.testing.assert_close(guided, null + scale * (given_ - null), rtol=1e-12, atol=1e-12)
    assert len(net.calls) == (1 if scale == 1 else 2)


def test_guided_velocity_of_a_row_without_label_is_its_velocity():
    x, t, cond = states()
    null = unlabelled(cond)
    torch.testing.assert_close(
        guided_velocity(MIXTURE, x, t, null, 3.0), MIXTURE.velocity(x, t), rtol=0, atol=1e-12
    )


def test_guided_velocity_leaves_by_the_limit_at_most():
    x, t, cond = states()
    moved = guided_velocity(MIXTURE, x, t, cond, 3.0, 0.05) - MIXTURE.velocity(x, t, cond)
    assert rms(moved).max() <= 0.1 + 1e-12
    assert rms(moved).max() > 0.099


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_guided_target_has_the_fixed_point_of_scale_one_over_one_minus_share(share):
    """v = v_c + a (v(y) - v(null)) averages to v(y) where v is guided with 1 / (1 - a)."""
    x, t, cond = states()
    null, given_ = MIXTURE.velocity(x, t), MIXTURE.velocity(x, t, cond)
    rows = torch.ones(len(x), dtype=torch.bool)

    def gap(scale):
        def net(x, t, r, cond):
            strength = like((cond["label"] != NULL_LABEL).to(x.dtype), x)
            return {"v": null + strength * scale * (given_ - null)}

        target = guided_target(given_, net, x, t, cond, rows, share)  # given_ is v_c's mean
        return float((target - net(x, t, t, cond)["v"]).abs().max())

    assert gap(1 / (1 - share)) < 1e-12
    assert gap(1.1 / (1 - share)) > 0.01


def test_guided_target_is_plain_on_the_rows_outside_the_mask():
    x, t, cond = states()
    rows = torch.arange(64) % 2 == 0
    v_c = torch.randn(64, 2, generator=rng(2), dtype=F64)
    target = guided_target(v_c, MIXTURE, x, t, cond, rows, 0.5)
    direction = guidance_direction(MIXTURE, x, t, cond)
    assert torch.equal(target[~rows], v_c[~rows])
    torch.testing.assert_close(target[rows], (v_c + 0.5 * direction)[rows])


def test_guided_target_without_a_share_needs_no_labels():
    x, t, _ = states()
    assert guided_target(x, MIXTURE, x, t, None, t > 0, 0.0) is x
    with pytest.raises(ValueError, match="labels"):
        guided_target(x, MIXTURE, x, t, None, t > 0, 0.5)


def test_guided_target_is_limited_before_it_is_scaled():
    x, t, cond = states()
    rows = torch.ones(64, dtype=torch.bool)
    moved = guided_target(x, MIXTURE, x, t, cond, rows, 0.5, 0.04) - x
    assert float(rms(moved).max()) == pytest.approx(0.02)


@settings(max_examples=30)
@given(bound=st.floats(0.01, 10), scale=st.floats(0, 100))
def test_limited_norm_keeps_the_direction_and_short_rows(bound, scale):
    direction = scale * torch.randn(5, 3, 2, generator=rng(), dtype=F64)
    limited = limit_norm(direction, bound)
    assert (rms(limited) <= bound * (1 + 1e-12)).all()
    short = rms(direction) <= bound
    torch.testing.assert_close(limited[short], direction[short])
    cosine = (limited * direction).flatten(1).sum(1)
    torch.testing.assert_close(cosine, 6 * rms(limited) * rms(direction))
    torch.testing.assert_close(rms(limited)[~short], torch.full_like(rms(limited)[~short], bound))


def test_limited_norm_of_nothing_is_nothing():
    for bound in (0.5, math.inf):
        assert torch.equal(limit_norm(torch.zeros(2, 3), bound), torch.zeros(2, 3))


def test_interval_is_closed():
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert inside(t, (0.25, 0.75)).tolist() == [False, True, True, True, False]
    assert inside(t, (0.0, 1.0)).all()


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.5,)])
def test_impossible_intervals_are_refused(interval):
    with pytest.raises(ValueError, match="interval"):
        check_interval("x.interval", interval)
