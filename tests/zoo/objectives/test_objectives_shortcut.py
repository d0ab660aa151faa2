"""Shortcut models: the loss computed row by row, the grid of times, limits, guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.networks import Toy
from benchmarks.conformance.subject import GAUSSIAN, MIXTURE, Subject, law_batch
from registry.protocols import NULL_LABEL
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.shortcut import Shortcut
from zoo.oracles import identities
from zoo.teachers import EmaTeacher, Online
from zoo.weighting import LearnedLogvar

HALF = Shortcut(bootstrap_fraction=0.5, num_steps=8)


def second_opinion(seen, teacher, k, *, scale=1.0, clip=4.0, num_steps=8):
    """Row by row: the first k are bootstrapped, the others regress the conditional velocity."""
    call, losses = seen.trained(), []
    x1 = noise_of(call.x, call.t, seen.batch.x0)
    for i in range(len(call.x)):
        x, t, r = call.x[i : i + 1], float(call.t[i]), float(call.r[i])
        label = call.labels[i : i + 1]

        def u_of(net, x, t, r, label=label):
            times = (torch.tensor([time], dtype=torch.float64) for time in (t, r))
            return net(x, *times, {"label": label})["u"]

        def taught(x, t, r, label=label, guided=(t - r) * num_steps == 2):
            null = torch.full_like(label, NULL_LABEL)
            u, u_null = (u_of(teacher, x, t, r, which) for which in (label, null))
            return u_null + scale * (u - u_null) if guided and label != NULL_LABEL else u

        if i < k:
            half = (t - r) / 2
            first = taught(x, t, t - half)
            moved = (x - half * first).clamp(-clip, clip)
            target = ((first + taught(moved, t - half, r)) / 2).clamp(-clip, clip).detach()
        else:
            target = (x1 - seen.batch.x0)[i : i + 1]
        losses.append(((u_of(seen.net, x, t, r) - target) ** 2).mean())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 1.0), ({"guidance_scale": 2.5}, 2.5), ({"clip": 0.05}, 1.0)],  # below most values
    ids=["plain", "guided", "clipped"],
)
def test_loss_agrees_row_by_row(settings, scale):
    objective = replace(HALF, **settings, label_dropout=0.3, teacher=EmaTeacher())
    objective.teacher.attach(teacher := Toy((2,), ("u",), seed=5))
    seen = watch(objective, n=24)
    loss = second_opinion(seen, teacher, 12, scale=scale, clip=settings.get("clip", 4.0))
    seen.agrees(loss)
    raw = {"consistency": loss[:12].detach(), "v": loss[12:].detach()}
    assert set(seen.out.terms) == set(raw)
    for name, rows in raw.items():
        torch.testing.assert_close(seen.out.terms[name], rows, rtol=1e-5, atol=1e-6)
    smallest = ((seen.out.t - seen.out.r)[:12] * 8 == 2).sum()
    assert 0 < smallest < 12  # guidance has rows to act on, and others


def test_learned_weight_reads_the_networks_output():
    seen = watch(replace(HALF, weight=LearnedLogvar()))
    call, error = seen.trained(), torch.cat([*seen.out.terms.values()])  # bootstrapped rows first
    logvar = seen.net(call.x, call.t, call.r, {"label": call.labels})["logvar"]
    expected = (-logvar).exp() * error + logvar
    torch.testing.assert_close(seen.out.per_sample, expected, rtol=1e-6, atol=1e-9)


def test_share_of_bootstrapped_rows_is_rounded_up():
    for n, k in ((1, 1), (8, 1), (9, 2), (64, 8)):
        out = watch(Shortcut(), n=n).out
        assert len(out.terms["consistency"]) == k
        assert len(out.terms.get("v", ())) == n - k


def test_times_lie_on_the_grid_of_their_step():
    rng = torch.Generator().manual_seed(0)
    t, r = (x.double() for x in Shortcut(num_steps=128).draw_times(6000, 3000, rng))
    level = -torch.log2(t - r)
    assert torch.equal(level, level.round())
    assert torch.equal((t / (t - r)).round(), t / (t - r))  # t is a multiple of its step
    assert (level[3000:] == 7).all()
    # Seven whole steps, equally likely: 3000 / 7 rows each, five standard deviations.
    counts = torch.bincount(level[:3000].long(), minlength=7)
    assert len(counts) == 7
    assert (counts - 3000 / 7).abs().max() < 5 * (3000 * 6 / 49) ** 0.5
    assert r.min() == 0
    assert t.max() == 1
    # Every cell of the grid of 4 steps is drawn alike.
    cells = torch.bincount((r[:3000][level[:3000] == 2] * 4).long(), minlength=4)
    assert (cells - cells.sum() / 4).abs().max() < 5 * (cells.sum() * 3 / 16) ** 0.5


def test_anchor_tends_to_flow_matching_linearly_in_the_step():
    """At the same times and noise, the gradient's difference halves with the step."""

    def error(num_steps):
        objective = Shortcut(bootstrap_fraction=0.0, num_steps=num_steps)
        seen = watch(objective, n=64, labels="none")

        def as_velocity(x, t, r, cond):
            return {"v": seen.net(x, t, r, cond)["u"]}

        def times(n, rng):
            return seen.out.t, seen.out.t

        rng = torch.Generator().manual_seed(0)
        reference = FlowMatching(times=times).loss(as_velocity, seen.batch, rng).per_sample
        exact = seen.gradient(reference)
        return float((seen.gradient() - exact).norm() / exact.norm())

    coarse, fine = error(512), error(1024)
    assert fine < 5e-3
    assert 1.6 < coarse / fine < 2.4  # other times, so not exactly 2


@pytest.mark.parametrize("law", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_bootstrapped_target_is_exact_at_the_truth(law):
    """No error beyond the solver's: the two halves compose to the whole step."""
    objective = Shortcut(bootstrap_fraction=1.0, label_dropout=0.0)
    out = objective.loss(law, law_batch(law, 256, 0), torch.Generator().manual_seed(0))
    assert out.terms["consistency"].max().sqrt() < 1e-4


def test_target_is_the_identitys():
    """The residual of zoo/oracles/identities, for whatever network."""
    objective = Shortcut(bootstrap_fraction=1.0, teacher=Online(), clip=1e9)
    seen = watch(objective, labels="none")
    call = seen.trained()
    residual = identities.shortcut(seen.net, call.x, call.t.double(), call.r.double())
    torch.testing.assert_close(seen.out.per_sample, (residual**2).mean(1), rtol=1e-5, atol=1e-6)


def test_anchor_alone_is_biased_by_half_a_step():
    """u over one step is not v: the default's bias is what `exact_with` takes away."""
    coarse = Subject("shortcut", lambda: Shortcut(num_steps=2))
    assert fixed_point.measure(coarse, GAUSSIAN, exact=False).z > 4
    assert fixed_point.measure(coarse, GAUSSIAN, exact=True).z < 4


def test_guidance_needs_labels():
    with pytest.raises(ValueError, match="labels"):
        watch(Shortcut(guidance_scale=1.5), labels="none")


def test_defaults_are_those_of_the_released_code():
    objective = Shortcut()
    assert (objective.num_steps, objective.bootstrap_fraction, objective.clip) == (128, 1 / 8, 4.0)
    assert objective.teacher == EmaTeacher(decay=0.999)
    assert objective.label_dropout == 0.1
    assert objective.guidance_scale == 1.0


@pytest.mark.parametrize("num_steps", [0, 1, 3, 100])
def test_number_of_steps_must_be_a_power_of_two(num_steps):
    with pytest.raises(ValueError, match="power of two"):
        Shortcut(num_steps=num_steps)


def test_share_must_be_a_fraction():
    with pytest.raises(ValueError, match=r"^shortcut\.bootstrap_fraction = "):
        Shortcut(bootstrap_fraction=1.5)
