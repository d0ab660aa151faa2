"""sCM: its loss computed a second time in the paper's symbols, and the sign of its tangent."""

from __future__ import annotations

import math

import pytest
import torch
from objective_cases import watch

from backbones.parametrisations import Trig
from benchmarks.conformance.networks import Toy
from registry.protocols import Batch, Call
from zoo.derivatives.methods import Jvp
from zoo.objectives.trig_consistency import TrigConsistency
from zoo.oracles import GaussianOracle, exact_on
from zoo.paths import Linear, TrigFlow, angle_on
from zoo.points.velocities import FromTeacher, Own
from zoo.teachers import Frozen
from zoo.times import LogitNormal
from zoo.weighting import Unweighted

LINEAR = {"path": Linear(), "times": LogitNormal(mean=-1.0, std=1.4)}
F64 = torch.float64


def on_circle(net, cond, s):
    """F(y, phi) of a network on the path `trigflow`."""

    def F(y, phi):
        cos, sin = torch.cos(phi), torch.sin(phi)
        level = s * sin / cos
        t = 2 / math.pi * torch.atan(level)
        alpha, sigma = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        x = y / s * ((s * alpha) ** 2 + sigma**2).sqrt()[:, None]
        f = x - t[:, None] * net(x, t, torch.zeros_like(t), cond)["u"]
        return (cos[:, None] * y - f) / (s * sin)[:, None]

    return F


def second_opinion(seen, s, rho, limit, *, teacher=None, prior=True, sign=1):
    """e^-w / (s tan phi) mean || F - sg[F + g] ||^2 + w, with a derivative of F in y and phi."""
    call, x0 = seen.trained(), seen.batch.x0
    t = call.t.double()
    phi = torch.atan(torch.tan(math.pi / 2 * t) / s)
    x1 = (call.x - torch.cos(math.pi / 2 * t)[:, None] * x0) / torch.sin(math.pi / 2 * t)[:, None]
    cos, sin = torch.cos(phi)[:, None], torch.sin(phi)[:, None]
    y = cos * x0 + sin * s * x1
    dy = cos * s * x1 - sin * x0
    if teacher is not None:
        v = teacher(call.x, t, t, {"label": call.labels})["u"]
        dx0 = TrigFlow().to_x0(call.x, v, t)
        dy = (cos * y - dx0) / sin
    F = on_circle(seen.net, {"label": call.labels}, s)
    _, dF = torch.func.jvp(F, (y, phi), (dy, torch.ones_like(phi)))
    value = F(y, phi)
    g = -(cos**2) * (s * value - dy) - rho * cos * sin * (y + s * dF)
    g = sign * limit(g.detach())
    error = (value - value.detach() - g).square().mean(1)
    if prior:
        error = error / (s * torch.tan(phi))
    w = seen.net(call.x, call.t, call.r, {"label": call.labels})["logvar"]
    return (-w).exp() * error + w


def by_length(g):
    return g / (g.square().mean(1, keepdim=True).sqrt() + 0.1)


CASES = {
    "default": ({}, by_length),
    "clipped": ({"tangent": "clipped"}, lambda g: g.clamp(-1, 1)),
    "raw": ({"tangent": "raw"}, lambda g: g),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [0, 600, 9_000])
def test_loss_is_that_of_the_paper(case, step):
    settings, limit = CASES[case]
    objective = TrigConsistency(warmup=0.1, sigma_data=0.7, derivative=Jvp(), **settings)
    seen = watch(objective, n=24, step=step)
    rho = min(seen.batch.progress / 0.1, 1.0)
    loss = second_opinion(seen, 0.7, rho, limit)
    # Times are float32, and small ones divide.
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=1e-4, atol=1e-4)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


def test_tangent_with_the_other_sign_is_another_gradient():
    """The negative control of the test above."""
    seen = watch(TrigConsistency(), n=24, step=9_000)
    wrong = seen.gradient(second_opinion(seen, 0.5, 1.0, by_length, sign=-1))
    assert float((seen.gradient() - wrong).norm() / wrong.norm()) > 0.5


def test_distillation_takes_the_velocity_of_the_teacher():
    objective = TrigConsistency(velocity=FromTeacher(), teacher=Frozen(), warmup=0.0)
    teacher = Toy((2,), ("u",), seed=5)
    objective.teacher.attach(teacher)
    seen = watch(objective, n=24)
    loss = second_opinion(seen, 0.5, 1.0, by_length, teacher=teacher)
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=1e-3, atol=1e-3)


def exact(law, **settings):
    objective = TrigConsistency(
        velocity=FromTeacher(), teacher=Frozen(), weight=Unweighted(), tangent="raw", **settings
    )
    network = exact_on(law, objective.path)
    objective.teacher.attach(network)
    return objective, network


@pytest.mark.parametrize("settings", [{}, LINEAR], ids=["trigflow", "linear"])
def test_tangent_vanishes_at_the_exact_map_after_the_warm_up_alone(settings):
    """At rho = 0 the fixed point is the denoiser, which is another function than the map."""
    law = GaussianOracle([0.6, -0.4], [0.4, 0.8])
    objective, network = exact(law, **settings)
    rng = torch.Generator().manual_seed(0)
    x0, _ = law.sample(256, rng)
    at = [objective.loss(network, Batch(x0=x0, progress=p), rng).terms["tangent"] for p in (0, 1)]
    assert float(at[1].max()) ** 0.5 < 1e-4
    assert float(at[0].max()) ** 0.5 > 0.05


def test_tangent_is_negative_where_u_is_too_large():
    """A constant is added to u at the exact map: F is to fall."""
    law = GaussianOracle([0.6, -0.4], [0.4, 0.8])
    objective, network = exact(law)
    rng = torch.Generator().manual_seed(0)
    x0, _ = law.sample(256, rng)
    offset = torch.zeros((), dtype=F64, requires_grad=True)
    for eps in (0.1, -0.1):

        def off(x, t, r, cond, eps=eps):
            return {"u": network(x, t, r, cond)["u"] + eps + offset}

        loss = objective.loss(off, Batch(x0=x0, progress=1.0), rng).per_sample.mean()
        (slope,) = torch.autograd.grad(loss, offset)
        assert float(slope) * eps > 0


@pytest.mark.parametrize("path", [Linear(), TrigFlow()], ids=["linear", "trigflow"])
@pytest.mark.parametrize("s", [0.5, 1.0])
def test_angle_is_that_of_the_paper(path, s):
    """tan phi = sigma / (s alpha), with its slope by differences; at s = 1 it is our own clock."""
    t = torch.linspace(0.01, 0.99, 9, dtype=F64)
    phi = angle_on(path, t, s)
    ours = torch.atan2(phi.sin, phi.cos)
    torch.testing.assert_close(torch.tan(ours), path.sigma(t) / (s * path.alpha(t)))
    torch.testing.assert_close(phi.cos**2 + phi.sin**2, torch.ones_like(t))
    beside = (angle_on(path, t + h, s) for h in (1e-5, -1e-5))
    ends = [torch.atan2(angle.sin, angle.cos) for angle in beside]
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, phi.d_dt, rtol=1e-6, atol=0)
    if s == 1 and isinstance(path, TrigFlow):
        torch.testing.assert_close(ours, math.pi / 2 * t)


def test_readout_of_the_network_is_the_f_of_the_paper():
    """F = (t u - (1 - cos) x) / sin at s = 1, which is the raw readout of `trig`."""
    rng = torch.Generator().manual_seed(0)
    x, raw = (torch.randn(5, 2, generator=rng, dtype=F64) for _ in range(2))
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    u = Trig(sigma_data=1.0)(raw, "u", Call(x, t, torch.zeros_like(t), None))
    phi = angle_on(TrigFlow(), t, 1.0)
    F = (t[:, None] * u - (1 - phi.cos)[:, None] * x) / phi.sin[:, None]
    torch.testing.assert_close(F, raw)


def test_warm_up_is_a_share_of_the_run():
    objective = TrigConsistency(warmup=0.2)
    assert [objective.rho(p) for p in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert TrigConsistency(warmup=0.0).rho(0.0) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tangent": "long"},
            "trig_consistency.tangent = 'long'; allowed: 'normalised', 'clipped'",
        ),
        ({"sigma_data": 0.0}, "trig_consistency.sigma_data = 0.0 must be positive"),
        ({"offset": 0.0}, "trig_consistency.offset = 0.0 must be positive"),
        (
            {"guidance_scale": 2.0},
            "trig_consistency.guidance_scale = 2.0 is the scale of a trained",
        ),
        ({"velocity": Own()}, "trig_consistency.velocity = @own"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrigConsistency(**settings)
