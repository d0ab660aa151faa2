"""DuMo: the loss computed row by row, its error identity, its bias when clipped, guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.networks import Tapped, Toy
from benchmarks.conformance.subject import GAUSSIAN, MIXTURE, Subject, law_batch
from registry.protocols import NULL_LABEL
from zoo.derivatives.methods import Dual, Jvp
from zoo.derivatives.one_pass import outputs_then_derivative
from zoo.objectives.dumo import DuMo
from zoo.ops import like
from zoo.oracles import identities
from zoo.oracles.solver import integrate
from zoo.residuals import Exact, Rcgm
from zoo.teachers import EmaTeacher, Online
from zoo.times import BetaPair, Uniform
from zoo.weighting import LearnedLogvar, PseudoHuber

F64 = torch.float64
MOSTLY_OFF = BetaPair(off_diagonal_fraction=0.9)


def residual_of_row(u, teacher, x, t, r, d, residual):
    """RCGM's finite difference in scalar arithmetic, or the exact derivative by autograd."""
    if isinstance(residual, Exact):
        _, du = torch.func.jvp(u, (x, t, r), (d, torch.ones_like(t), torch.zeros_like(r)))
        return u(x, t, r) - d + (t - r) * du
    if t == r:
        return u(x, t, r) - d
    m = max(t - residual.delta, r)
    z, total = x - (t - m) * d, 0.0
    for i in range(residual.order):
        start = m - i * (m - r) / residual.order
        end = m - (i + 1) * (m - r) / residual.order
        step = (start - end) * teacher(z, start, end)
        total, z = total + step, z - step
    return ((t - r) * u(x, t, r) - total) / (t - m) - d


def second_opinion(seen, objective, teacher, omega=0.0, interval=(0.0, 1.0)):
    call, losses, raw = seen.trained(), [], {"v": [], "u": []}
    x1 = noise_of(call.x, call.t, seen.batch.x0)
    for i in range(len(call.x)):
        x, t, r = call.x[i : i + 1], call.t[i : i + 1].double(), call.r[i : i + 1].double()
        label = call.labels[i : i + 1]

        def out_of(net, x, t, r, label=label):
            return net(x, t, r, {"label": label})

        v_g = (x1 - seen.batch.x0)[i : i + 1]
        if label != NULL_LABEL and interval[0] <= t <= interval[1]:
            null = torch.full_like(label, NULL_LABEL)
            v_y, v_null = (out_of(teacher, x, t, t, which)["v"] for which in (label, null))
            v_g = v_g + omega * (v_y - v_null).detach()
        out = out_of(seen.net, x, t, r)
        d = out["v"].detach() if objective.direction == "head" else v_g
        with torch.no_grad():
            g = residual_of_row(
                lambda x, t, r: out_of(seen.net, x, t, r)["u"],
                lambda x, t, r: out_of(teacher, x, t, r)["u"],
                x, t, r, d, objective.residual,
            )  # fmt: skip
        if objective.clip_by == "element":
            g = g.clamp(-objective.clip, objective.clip)
        else:
            g = g / max(1.0, float(g.square().mean().sqrt()) / objective.clip)
        error_v = ((out["v"] - v_g) ** 2).mean()
        error_u = ((out["u"] - (out["u"] - g).detach()) ** 2).mean()
        losses.append(error_v + objective.lambda_u * error_u)
        raw["v"].append(error_v.detach())
        raw["u"].append(error_u.detach())
    return torch.stack(losses), {name: torch.stack(rows) for name, rows in raw.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"residual": Rcgm(order=2, delta=0.01)},
        {"residual": Rcgm(order=3, delta=0.2), "direction": "guided"},
        {"residual": Rcgm(order=1, delta=0.3), "clip_by": "rms", "clip": 0.5},
        {"residual": Exact(), "direction": "guided", "omega": 0.6},
        {"residual": Exact(), "omega": 0.6, "guidance_interval": (0.2, 0.7), "lambda_u": 0.3},
    ],
    ids=["default", "order_3", "order_1_by_rms", "exact_guided", "interval"],
)
def test_loss_agrees_row_by_row(settings):
    """Rows with t - r above and below delta, on the diagonal, with and without their label."""
    objective = DuMo(times=MOSTLY_OFF, label_dropout=0.3, **settings)
    objective.teacher.attach(teacher := Toy((2,), ("u", "v"), seed=5))
    seen = watch(objective, n=32)
    omega = settings.get("omega", 0.0)
    interval = settings.get("guidance_interval", (0.0, 1.0))
    loss, raw = second_opinion(seen, objective, teacher, omega, interval)
    # Dividing by delta = 0.01 turns float32 times into errors of 1e-5.
    torch.testing.assert_close(seen.out.per_sample, loss, rtol=1e-4, atol=1e-4)
    ours, theirs = seen.gradient(), seen.gradient(loss)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    for name, rows in raw.items():
        torch.testing.assert_close(seen.out.terms[name], rows, rtol=1e-4, atol=1e-4)


def test_weights_are_applied_to_their_own_errors():
    plain = watch(DuMo())
    for name in ("v", "u"):
        weighted = watch(DuMo(**{f"weight_{name}": PseudoHuber(c=0.3)}))
        error = plain.out.terms[name]
        change = (error + 0.09).sqrt() - 0.3 - error
        torch.testing.assert_close(
            weighted.out.per_sample - plain.out.per_sample, change, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("name", ["v", "u"])
def test_weights_read_the_networks_outputs(name):
    seen = watch(DuMo(**{f"weight_{name}": LearnedLogvar()}))
    call, terms = seen.trained(), dict(seen.out.terms)
    logvar = seen.net(call.x, call.t, call.r, {"label": call.labels})["logvar"]
    likelihood = (-logvar).exp() * terms.pop(name) + logvar
    (other,) = terms.values()
    torch.testing.assert_close(seen.out.per_sample, likelihood + other, rtol=1e-6, atol=1e-9)


def test_gradient_of_u_is_the_clipped_residual_itself():
    """2 clip(g) / D to the output, not the residual's own slope: u is detached inside it."""
    objective = DuMo(residual=Rcgm(order=1, delta=0.1), clip=10.0, teacher=Online())
    net, batch = Toy((2,), ("u", "v")), law_batch(GAUSSIAN, 16, 0)
    leaf = torch.zeros(16, 2, dtype=F64, requires_grad=True)

    def moved(x, t, r, cond):
        out = net(x, t, r, cond)
        return {**out, "u": out["u"] + leaf} if torch.is_grad_enabled() else out

    out = objective.loss(moved, batch, torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(out.per_sample.sum(), leaf)
    size = slope.square().mean(1).sqrt()  # 2 g / D, D = 2
    torch.testing.assert_close(size, out.diagnostics["residual_rms"], rtol=1e-9, atol=1e-12)


def test_both_losses_see_every_row():
    for n in (1, 7):
        out = watch(DuMo(), n=n).out
        assert {name: len(rows) for name, rows in out.terms.items()} == {"u": n, "v": n}
    seen = watch(DuMo())
    for key in ("u", "v"):
        reached = torch.autograd.grad(
            seen.out.per_sample.sum(), seen.calls[0].value[key], retain_graph=True
        )[0]
        assert (reached[:12] != 0).all()


@pytest.mark.parametrize(
    ("residual", "omega", "calls"),
    [
        (Rcgm(order=2), 0.0, 3),
        (Rcgm(order=3), 0.0, 4),
        (Exact(), 0.0, 1),
        (Exact(derivative=Dual()), 0.0, 2),
        (Rcgm(order=2), 0.5, 5),
    ],
)
def test_passes_are_one_with_gradient_and_those_of_the_target(residual, omega, calls):
    seen = watch(DuMo(residual=residual, omega=omega, teacher=Online()))
    assert len(seen.calls) == calls
    assert sum(call.with_gradient for call in seen.calls) == 1


def test_error_of_a_jump_is_the_residuals_integral():
    """x_t - (t - r) u - X_v = - int_r^t R along the v head's own trajectory, for any network."""
    net = Toy((2,), ("u", "v"))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t, r = 0.9, 0.2

    def full(time):
        return torch.full((6,), time, dtype=F64)

    def velocity(x, time):
        return net(x, full(time), full(time), None)["v"]

    def slope(s, state):  # s in [0, 1] runs from t down to r; the state is (x, integral of R)
        time, here = t - s * (t - r), state[:, :2]
        u, d = net(here, full(time), full(r), None)["u"], velocity(here, time)
        point = here, full(time), full(r)
        _, du_along = outputs_then_derivative(Jvp(), net, None, point)
        residual = Exact()(du_along, net, *point, None, u, d)
        return (t - r) * torch.cat([-d, residual], 1)

    end = integrate(slope, torch.cat([x, torch.zeros_like(x)], 1), 1e-9)
    jump = x - (t - r) * net(x, full(t), full(r), None)["u"]
    error = jump - end[:, :2]
    torch.testing.assert_close(error, -end[:, 2:], rtol=1e-7, atol=1e-7)
    assert error.abs().max() > 0.1


def test_exact_residual_is_the_mean_flow_identity():
    net, (x, t, r) = Toy((2,), ("u", "v")), points()
    d = net(x, t, t, None)["v"]
    out, du_along = outputs_then_derivative(Exact().derivative, net, None, (x, t, r))
    residual = Exact()(du_along, net, x, t, r, None, out["u"].detach(), d)
    torch.testing.assert_close(residual, identities.mean_flow(net, x, t, r), rtol=0, atol=1e-12)


def test_bias_of_the_finite_difference_halves_with_its_step():
    """At the truth, for the shipped order; the suite's limit is about other networks."""

    def rms(delta):
        objective = DuMo(residual=Rcgm(order=2, delta=delta), label_dropout=0.0)
        objective.teacher.attach(GAUSSIAN)
        rng = torch.Generator().manual_seed(0)
        out = objective.loss(GAUSSIAN, law_batch(GAUSSIAN, 512, 0), rng)
        return float(out.diagnostics["residual_rms"].square().mean().sqrt())

    assert 1.8 < rms(0.04) / rms(0.02) < 2.2
    assert rms(0.01) < 0.02


def test_finite_difference_along_the_conditional_velocity_is_right_on_average():
    """For Gaussian data, whose flow map is affine: within its bias of O(delta)."""
    residual = Rcgm(order=2, delta=2e-3)
    objective = DuMo(residual=residual, direction="guided", clip=1e9, times=MOSTLY_OFF)
    found = fixed_point.measure(Subject("dumo", lambda: objective), GAUSSIAN, exact=False)
    assert found.z < 4
    assert found.shift < 0.02


def clipped_bias(law, clip_by, clip=1.0):
    """Along the conditional velocity; along the v head there is none, which the suite shows."""
    fields = {"residual": Exact(), "direction": "guided", "clip": clip, "clip_by": clip_by}
    objective = DuMo(**fields, times=BetaPair(off_diagonal_fraction=0.5))
    return fixed_point.measure(Subject("dumo", lambda: objective), law, exact=False)


@pytest.mark.parametrize("clip_by", ["element", pytest.param("rms", marks=pytest.mark.slow)])
def test_clip_with_a_conditional_velocity_moves_the_optimum_at_a_skewed_mixture(clip_by):
    biased = clipped_bias(MIXTURE, clip_by)
    assert biased.z > 4
    assert biased.output == "u"
    assert clipped_bias(GAUSSIAN, clip_by).z < 4  # a symmetric law cannot show it


@pytest.mark.slow
def test_conditional_velocity_without_a_clip_moves_nothing():
    assert clipped_bias(MIXTURE, "element", clip=1e9).z < 4


class Guided(torch.nn.Module):
    """The mixture's velocities under classifier-free guidance; u is not trained here."""

    shape = MIXTURE.shape

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, t, r, cond=None):
        null = MIXTURE.velocity(x, t)
        given = MIXTURE.velocity(x, t, cond) if cond else null
        v = null + self.scale * (given - null)
        return {"u": v, "v": v}


@pytest.mark.parametrize("omega", [0.5, 0.6])
def test_guidance_scale_is_one_over_one_minus_omega(omega, monkeypatch):
    objective = DuMo(omega=omega, lambda_u=0.0, times=Uniform(), residual=Exact())
    subject, scale = Subject("dumo", lambda: objective), 1 / (1 - omega)

    def bias(scale):
        monkeypatch.setattr(Subject, "exact_field", lambda self, law: Guided(scale))
        return fixed_point.measure(subject, MIXTURE, exact=False)

    assert bias(scale).z < 4
    assert bias(0.7 * scale).z > 4
    assert bias(1.3 * scale).z > 4


def test_teacher_evaluates_guidance_and_finite_differences_alone():
    objective = DuMo(omega=0.5, teacher=EmaTeacher(), residual=Rcgm(order=2))
    objective.teacher.attach(watched := Tapped(Toy((2,), ("u", "v")), 12))
    seen = watch(objective)
    assert len(seen.calls) == 1
    assert len(watched.calls) == 4
    assert not any(call.with_gradient for call in watched.calls)
    apart = replace(objective, residual=Exact(derivative=Dual()), omega=0.0)
    assert not watch(apart).calls[1].with_gradient


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("omega", 1.0),
        ("omega", -0.1),
        ("direction", "sideways"),
        ("clip_by", "row"),
        ("guidance_interval", (0.9, 0.1)),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"^dumo\.{field} = "):
        DuMo(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("order", 0), ("delta", 0.0), ("delta", 1.0)])
def test_impossible_finite_differences_are_refused(field, value):
    with pytest.raises(ValueError, match=f"rcgm.{field}"):
        Rcgm(**{field: value})


def points(n=8):
    rng = torch.Generator().manual_seed(4)
    t = torch.rand(n, generator=rng, dtype=F64)
    x = torch.randn(n, 2, generator=rng, dtype=F64)
    return x, t, like(t, t) * torch.rand(n, generator=rng, dtype=F64)
