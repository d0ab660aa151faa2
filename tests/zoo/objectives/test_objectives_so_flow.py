"""SoFlow: its loss computed a second time, as the released code writes it, and its schedules."""

from __future__ import annotations

import pytest
import torch
from objective_cases import noise_of, watch

from registry.protocols import NULL_LABEL
from zoo.objectives.so_flow import SHORTEST, SoFlow
from zoo.ops import like
from zoo.teachers import Online
from zoo.times import TwoLogitNormals

HALF = TwoLogitNormals(off_diagonal_fraction=0.5)


def second_opinion(seen, objective, share, k):
    """The gradient's surrogates: - mean(F sg[q w]) of solutions f = x + (s - t) F, and w d^2."""
    call, x0 = seen.trained(), seen.batch.x0
    x, t, s, label = call.x, call.t.double(), call.r.double(), call.labels
    velocity = noise_of(call.x, call.t, x0) - x0

    def F(x, t, s, label=label):
        return seen.net(x, t, s, {"label": label})["u"]

    if (w := objective.guidance_scale) > 1:
        with torch.no_grad():
            null = F(x, t, t, torch.full_like(label, NULL_LABEL))
            far = ((1 - t) / (1 - objective.fade)).clamp(0, 1 - 1e-6)
            k_t = torch.where(t <= objective.fade, 1.0, 1 - torch.exp(-0.025 * far / (1 - far)))
            guided = velocity + k_t[:, None] * (w - 1) * (velocity - null)
            mix = objective.guidance_mix
            guided = mix * guided + (1 - mix) * F(x, t, t)
        velocity = torch.where((label != NULL_LABEL)[:, None], guided, velocity)
    middle = torch.minimum(t + (s - t) * share, t - SHORTEST)
    f_t = x + like(s - t, x) * F(x, t, s)
    with torch.no_grad():
        x_l = x + velocity * like(middle - t, x)
        f_l = x_l + like(s - middle, x) * F(x_l, middle, s)
        q = (f_t - f_l) / like(t - middle, x)
        weight_q = 1 / (q.square().mean(1) + 0.01)
    consistency = -(F(x, t, s) * q * weight_q[:, None]).mean(1)
    delta = F(x, t, t) - velocity
    matching = delta.square().mean(1) / (delta.detach().square().mean(1) + 0.01)
    return torch.cat([consistency[:k], matching[k:]]), q.square().mean(1)[:k]


@pytest.mark.parametrize(
    "settings",
    [{}, {"first_share": 0.9, "last_share": 0.4}, {"guidance_scale": 3.0, "fade": 0.5}],
    ids=["default", "long_steps", "guided"],
)
@pytest.mark.parametrize("step", [0, 9_000])
def test_gradient_is_that_of_the_released_code(settings, step):
    objective = SoFlow(times=HALF, label_dropout=0.3, **settings)
    seen = watch(objective, n=24, step=step)
    loss, raw = second_opinion(seen, objective, objective.share(seen.batch.progress), k=12)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    # Times are float32, and differences of them divide.
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
    torch.testing.assert_close(seen.out.terms["u"], raw, rtol=1e-2, atol=1e-4)


def test_a_step_in_the_wrong_direction_is_another_gradient():
    """The negative control of the test above: q with the other sign."""
    objective = SoFlow(times=HALF)
    seen = watch(objective, n=24)
    loss, _ = second_opinion(seen, objective, objective.share(0.0), k=12)
    wrong = seen.gradient(torch.cat([-loss[:12], loss[12:]]))
    ours = seen.gradient()
    assert float((ours - wrong).norm() / ours.norm()) > 0.1


def test_share_falls_exponentially_over_the_run():
    objective = SoFlow(first_share=0.1, last_share=0.001)
    shares = [objective.share(progress) for progress in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.1, 0.01, 0.001])


def test_masks_are_shared_where_every_row_has_a_target():
    """As for CIFAR-10; masks of fewer rows would be others, and nothing would say so."""
    shared = Online(dropout="shared")
    with pytest.raises(ValueError, match="for some of the rows alone"):
        SoFlow(teacher=shared)
    assert (
        SoFlow(teacher=shared, times=TwoLogitNormals(off_diagonal_fraction=1.0)).teacher == shared
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_share": 0.0}, r"so_flow.first_share = 0.0 must lie in \(0, 1\]"),
        ({"last_share": 2.0}, r"so_flow.last_share = 2.0 must lie in \(0, 1\]"),
        ({"guidance_scale": 0.5}, "so_flow.guidance_scale = 0.5 must be >= 1"),
        ({"fade": 1.5}, "so_flow.fade = 1.5 is not a fraction"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SoFlow(**settings)
