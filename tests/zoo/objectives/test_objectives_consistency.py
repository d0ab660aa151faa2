"""Consistency models: the loss computed a second time in noise levels, as papers write it."""

from __future__ import annotations

import math

import pytest
import torch
from objective_cases import CLOSE, noise_of, watch

from benchmarks.conformance.networks import Toy
from registry.protocols import Batch
from zoo.objectives.consistency import Consistency
from zoo.oracles import GaussianOracle
from zoo.points.velocities import FromTeacher, Own
from zoo.teachers import EmaTeacher, Frozen, Online
from zoo.weighting import PseudoHuber, Unweighted

ICT = {"steps": "karras", "weight": PseudoHuber(c=0.1)}


def second_opinion(seen, c, ratio=None, teacher=None):
    """|| D(y_t, t) - D(y_r, r) || / (t - r) in noise levels t, r; y = x0 + t x1 or by Heun's step.

    r is `ratio` of t, or that of the watched call of the target.
    """
    call, target = seen.calls[0], seen.calls[1]
    cond = None if call.labels is None else {"label": call.labels}

    def D(y, level, net=seen.net, at=None):
        t = level / (1 + level)
        end = t if at == "t" else torch.zeros_like(t)
        x = y / (1 + level)[:, None]
        return x - t[:, None] * net(x, t, end, cond)["u"]

    x0, t = seen.batch.x0, call.t.double() / (1 - call.t.double())
    r = target.t.double() / (1 - target.t.double()) if ratio is None else ratio(t)
    x1 = noise_of(call.x, call.t, x0)
    y_t, y_r = x0 + t[:, None] * x1, x0 + r[:, None] * x1
    if teacher is not None:
        first = (y_t - D(y_t, t, teacher, "t")) / t[:, None]
        y_r = y_t + (r - t)[:, None] * first
        later = (y_r - D(y_r, r, teacher, "t")) / r[:, None]
        y_r = y_t + (r - t)[:, None] * (first + later) / 2
    with torch.no_grad():
        D_r = D(y_r, r)
    squared = (D(y_t, t) - D_r).square().sum(1)
    return ((squared + c**2).sqrt() - c) / (t - r)


def ect_ratio(stage, q=2.0, k=8.0, b=1.0):
    return lambda t: (t * (1 - (1 + k / (1 + torch.exp(b * t))) / q ** (stage + 1))).clamp_min(0)


def agrees(seen, loss, to=1e-3):
    """Steps are short and times float32, and their difference divides."""
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=to, atol=to)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    return float((ours - theirs).norm() / theirs.norm()) < to


@pytest.mark.parametrize(("step", "stage"), [(0, 0), (9_000, 2), (30_001, 7)])
def test_ect_is_that_of_the_paper_at_every_stage(step, stage):
    seen = watch(Consistency(), n=24, step=step)
    assert agrees(seen, second_opinion(seen, 1e-8, ect_ratio(stage)))


def test_another_ratio_is_another_loss():
    """The negative control of the test above: one stage later."""
    seen = watch(Consistency(), n=24, step=9_000)
    loss = second_opinion(seen, 1e-8, ect_ratio(3))
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) > 0.05


@pytest.mark.parametrize("step", [0, 9_000])
def test_ict_is_that_of_the_paper(step):
    seen = watch(Consistency(**ICT), n=24, step=step)
    assert agrees(seen, second_opinion(seen, 0.1))


@pytest.mark.parametrize(("progress", "num"), [(0.0, 10), (0.3, 40), (1.0, 1280)])
def test_ict_draws_neighbours_of_karras_grid(progress, num):
    """sigma_i of EDM with its lowest level at 0, and each pair as often as the law falls in it."""
    ends = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    grid = torch.linspace(*ends, num + 1, dtype=torch.float64) ** 7
    objective, rng = Consistency(steps="karras"), torch.Generator().manual_seed(0)
    drawn, _ = objective.times(20_000, rng)
    t, m = (s.double() / (1 - s.double()) for s in objective.pair(drawn, progress))
    above = torch.searchsorted(grid, t * 0.9999)
    torch.testing.assert_close(t, grid[above], rtol=1e-4, atol=0)
    below = torch.where(above == 1, 0, grid[above - 1])
    torch.testing.assert_close(m, below, rtol=1e-4, atol=0)
    normal = torch.special.ndtr((grid.log() + 1.1) / 2)
    share, expected = float((above == num // 2).float().mean()), normal[num // 2]
    error = math.sqrt(float(expected - normal[num // 2 - 1]) / 20_000)
    assert abs(share - float(expected - normal[num // 2 - 1])) < 4 * error


def test_time_is_the_logit_normal_of_the_noise_level():
    t, _ = Consistency().times(50_000, torch.Generator().manual_seed(0))
    log_level = torch.logit(t.double())
    assert float(log_level.mean()) == pytest.approx(-1.1, abs=4 * 2 / 50_000**0.5)
    assert float(log_level.std()) == pytest.approx(2.0, abs=0.03)


def distilled(heun, teacher):
    objective = Consistency(
        velocity=FromTeacher(), teacher=Frozen(), heun=heun, weight=PseudoHuber(c=0.1)
    )
    objective.teacher.attach(teacher)
    return objective


def test_heun_step_is_that_in_noise_levels():
    teacher = Toy((2,), ("u",), seed=5)
    seen = watch(distilled(True, teacher), n=24, step=9_000)
    target = seen.calls[1]
    assert (target.t > 0).any()
    loss, rows = second_opinion(seen, 0.1, teacher=teacher), target.t > 1e-4
    torch.testing.assert_close(seen.out.per_sample[rows], loss[rows], rtol=1e-3, atol=1e-3)
    euler = watch(distilled(False, teacher), n=24, step=9_000).out.per_sample
    assert not torch.allclose(euler[rows], loss[rows], rtol=1e-3, atol=1e-3)


def residual(objective, law, **settings):
    """The root mean square of D(x_t, t) - D(x_m, m) at the exact map."""
    return float(watch_exact(objective, law, **settings).terms["data"].mean()) ** 0.5


def watch_exact(objective, law, progress):
    rng = torch.Generator().manual_seed(0)
    x0, _ = law.sample(512, rng)
    return objective.loss(law, Batch(x0=x0, progress=progress), rng)


@pytest.mark.parametrize(("heun", "order"), [(False, 2), (True, 3)])
def test_distillation_is_exact_up_to_the_order_of_its_solver(heun, order):
    """One step of the exact velocity: an error of step^2 by Euler, and of step^3 by Heun."""
    law = GaussianOracle([0.6, -0.4], [0.4, 0.8])
    objective = distilled(heun, law)
    coarse, fine = (residual(objective, law, progress=p) for p in (0.51, 0.64))  # stages 4 and 5
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_target_is_the_average_where_it_is_asked_for():
    objective = Consistency(target=EmaTeacher(), weight=Unweighted())
    other = Toy((2,), ("u",), seed=3)
    seen = watch(objective)
    objective.target.attach(other)
    assert not torch.allclose(watch(objective).out.per_sample, seen.out.per_sample, **CLOSE)
    assert Consistency().target == Online(dropout="shared")


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("settings", [{}, ICT])
def test_times_at_the_ends_make_a_pair(t, settings):
    t, m = Consistency(**settings).pair(torch.full((1,), t), 1.0)
    assert 0 <= float(m) < float(t) < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "linear"}, "consistency.steps = 'linear'; allowed: sigmoid, karras"),
        ({"factor": 1.0}, "consistency.factor = 1.0 must be above 1"),
        ({"sigma_range": (2.0, 1.0)}, r"consistency.sigma_range = \(2.0, 1.0\)"),
        ({"heun": True}, "consistency.heun = True needs the ODE of a trained teacher"),
        ({"guidance_scale": 2.0}, "consistency.guidance_scale = 2.0 is the scale of a trained"),
        ({"guidance_scale": 0.5}, "consistency.guidance_scale = 0.5 must be at least 1"),
        ({"velocity": Own()}, "consistency.velocity = @own"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Consistency(**settings)
