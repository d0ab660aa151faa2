"""Drifting: its field computed a second time, sample by sample, and mistakes in it."""

from __future__ import annotations

import math

import pytest
import torch
from objective_cases import watch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject, random_batch
from zoo.features import RandomConvolutions
from zoo.objectives.drifting import Drifting

SETTINGS = {
    "default": {},
    "one_radius": {"radii": (0.5,)},
    "one_softmax": {"over_samples": False},
    "least_affinity": {"least_affinity": 1e-3},
}


def second_opinion(seen, objective, masked=True):
    """The loss and V^2, with every affinity from its own sums of exponentials."""
    call, size, losses, sizes = seen.trained(), objective.group, [], []
    f = call.x - seen.net(call.x, call.t, call.r, {"label": call.labels})["u"]
    f, data = (objective.features(x).double() for x in (f, seen.batch.x0))
    for first in range(0, len(f), size):
        mine, y = f[first : first + size], data[first : first + size]
        points = torch.cat([y, mine]).detach()  # the data first
        gap = torch.stack([(a - points).norm(dim=1) for a in mine.detach()])
        scale = gap.mean() / math.sqrt(f.shape[1])
        own = torch.cat([torch.zeros(size, size), torch.eye(size)], 1).bool()
        total, square = 0.0, 0.0
        for radius in objective.radii:
            k = torch.exp(-gap / gap.mean() / radius)
            k = torch.where(own, 0, k) if masked else k
            near = k / k.sum(1, keepdim=True)
            if objective.over_samples:
                near = (k * k / k.sum(0) / k.sum(1, keepdim=True)).sqrt()
            near = near.clamp_min(objective.least_affinity)
            field = torch.zeros_like(mine)
            for i in range(size):
                for j in range(size):
                    for m in range(size, 2 * size):
                        field[i] += near[i, j] * near[i, m] * (points[j] - points[m]) / scale
            total = total + field / field.square().mean().sqrt()
            square = square + field.square().mean(1) / len(objective.radii)
        target = (mine / scale + total).detach()
        losses.append((mine / scale - target).square().mean(1))
        sizes.append(square)
    return torch.cat(losses), torch.cat(sizes).detach()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loss_agrees_sample_by_sample(settings):
    objective = Drifting(group=5, **settings)
    seen = watch(objective, n=10)
    loss, drift = second_opinion(seen, objective)
    seen.agrees(loss)
    torch.testing.assert_close(seen.out.terms["drift"], drift)


def test_a_sample_that_repels_itself_is_another_loss():
    """The negative control of the test above."""
    objective = Drifting(group=5)
    seen = watch(objective, n=10)
    loss, _ = second_opinion(seen, objective, masked=False)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) > 0.1


def test_one_step_from_the_noise_is_trained_and_nothing_else():
    seen = watch(Drifting(group=4), n=8)
    (call,) = seen.calls
    assert call.t.tolist() == [1.0] * 8
    assert call.r.tolist() == [0.0] * 8
    x1 = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(call.x, x1)


def test_fields_have_one_size_so_that_the_loss_does_not_depend_on_it():
    """Samples that are nearer to the data have a smaller drift and the same loss."""
    objective = Drifting(group=16, radii=(0.2,))
    seen = watch(objective, n=32)
    assert float(seen.out.per_sample.detach().mean()) == pytest.approx(1)


def test_features_of_pictures_are_compared_and_pass_the_gradient_on():
    objective = Drifting(group=4, features=RandomConvolutions(channels=1, widths=(4, 8)))
    batch = random_batch((1, 8, 8), 8, labels="given", dtype=torch.float32, group=4)
    seen = watch(objective, n=8, shape=(1, 8, 8), batch=batch)
    loss, _ = second_opinion(seen, objective)
    torch.testing.assert_close(seen.out.per_sample, loss.float(), rtol=1e-3, atol=1e-5)
    assert float(seen.gradient().norm()) > 0


def wrong_field(change):
    def drift(self, made, data):
        return change(lambda a, b: Drifting.drift(self, a, b), made, data)

    return type("Wrong", (Drifting,), {"drift": drift})


def flipped(right, made, data):
    scale, fields = right(made, data)
    return scale, -fields


def attraction_alone(right, made, data):
    scale, fields = right(made, data)
    return scale, fields + 0.2 * (data.mean(1, keepdim=True) - made) / scale


CLAIMS = {"gaussian": fixed_point.at_gaussian, "pulled": fixed_point.pulled_back}


@pytest.mark.parametrize(("change", "claim"), [(flipped, "pulled"), (attraction_alone, "gaussian")])
def test_wrong_field_is_rejected(change, claim):
    result = run_claim(claim, CLAIMS[claim], Subject("drifting", wrong_field(change)))
    assert result.status == "FAIL", result.figure


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": 1}, "group = 1 leaves a sample no other to be repelled by"),
        ({"radii": ()}, r"radii = \(\) must be one or more positive numbers"),
        ({"radii": (0.1, 0.0)}, "must be one or more positive numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Drifting(**settings)
