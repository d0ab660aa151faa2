"""MeanFlow: its loss computed a second time, guidance, floor, limits and negative controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.mutations import Turned
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import GAUSSIAN, MIXTURE, Subject, law_batch, random_batch
from registry.protocols import NULL_LABEL
from zoo.derivatives.methods import Dual
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import like
from zoo.times import LogitNormalPair, UniformPair
from zoo.weighting import Adaptive, LearnedLogvar, Unweighted

HALF = UniformPair(off_diagonal_fraction=0.5)


def second_opinion(seen, omega=1.0, kappa=0.0, interval=(0.0, 1.0), power=1.0, offset=0.01):
    """The published loss, with the derivative on every row: sum of squares, adaptive weight."""
    call, x0 = seen.trained(), seen.batch.x0
    x, t, r, label = call.x, call.t.double(), call.r.double(), call.labels
    v_c = noise_of(call.x, call.t, x0) - x0

    def u(x, t, r, label=label):
        return seen.net(x, t, r, None if label is None else {"label": label})["u"]

    guided = omega * v_c + kappa * u(x, t, t)
    if label is None:
        v = v_c
    else:
        guided = guided + (1 - omega - kappa) * u(x, t, t, torch.full_like(label, NULL_LABEL))
        chosen = (label != NULL_LABEL) & (interval[0] <= t) & (t <= interval[1])
        v = torch.where(chosen[:, None], guided, v_c)
    u_t, du_dt = torch.func.jvp(u, (x, t, r), (v.detach(), torch.ones_like(t), 0 * r))
    squares = ((u_t - (v - like(t - r, x) * du_dt).detach()) ** 2).flatten(1)
    error = squares.sum(1)
    return error / (error.detach() + offset) ** power, squares.mean(1).detach()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"omega": 3.0},
        {"omega": 1.0, "kappa": 0.5},
        {"omega": 0.2, "kappa": 0.92, "guidance_interval": (0.1, 0.6)},
    ],
    ids=["plain", "omega", "kappa", "both_inside_an_interval"],
)
def test_loss_is_the_published_one(settings):
    """Also with labels dropped: such rows keep the conditional velocity."""
    seen = watch(MeanFlow(times=HALF, label_dropout=0.4, **settings), n=24)
    omega, kappa = settings.get("omega", 1.0), settings.get("kappa", 0.0)
    interval = settings.get("guidance_interval", (0.0, 1.0))
    loss, raw = second_opinion(seen, omega, kappa, interval)
    seen.agrees(loss)
    torch.testing.assert_close(seen.out.terms["u"], raw, rtol=1e-5, atol=1e-6)
    dropped = seen.trained().labels == NULL_LABEL
    assert 0 < dropped.sum() < 24  # the case has both kinds of row


@pytest.mark.parametrize("weight", [Adaptive(power=0.75, offset=1e-3), Adaptive(power=0.0)])
def test_weight_is_on_the_sum_of_squares(weight):
    seen = watch(MeanFlow(weight=weight), shape=(1, 4, 4), labels="none")
    seen.agrees(second_opinion(seen, power=weight.power, offset=weight.offset)[0])


def test_learned_weight_reads_the_networks_output():
    seen = watch(MeanFlow(weight=LearnedLogvar()))
    call = seen.trained()
    logvar = seen.net(call.x, call.t, call.r, {"label": call.labels})["logvar"]
    error = seen.out.terms["u"] * call.x[0].numel()  # the sum of squares
    expected = (-logvar).exp() * error + logvar
    torch.testing.assert_close(seen.out.per_sample, expected, rtol=1e-6, atol=1e-9)


def test_defaults_are_those_of_the_released_code():
    objective = MeanFlow()
    assert objective.times == LogitNormalPair(mean=-0.4, std=1.0, off_diagonal_fraction=0.25)
    assert objective.weight == Adaptive(power=1.0, offset=0.01)
    assert (objective.omega, objective.kappa, objective.label_dropout) == (1.0, 0.0, 0.1)


@pytest.mark.parametrize("n", [1, 4, 10])
def test_derivative_is_taken_on_the_rows_with_r_below_t_alone(n):
    k = -(-n // 4)
    seen = watch(MeanFlow(), n=n)
    assert [len(call.x) for call in seen.calls] == ([k, n - k] if n > 1 else [1])
    assert all(call.with_gradient for call in seen.calls)
    assert len(seen.out.diagnostics["du_dt_rms"]) == k
    seen = watch(MeanFlow(derivative=Dual()), n=n)
    assert [len(call.x) for call in seen.calls] == [n, k]
    derivative = seen.calls[1]
    assert not derivative.with_gradient
    assert torch.equal(derivative.x, seen.calls[0].x[: len(derivative.x)])
    assert torch.equal(derivative.labels, seen.calls[0].labels[: len(derivative.x)])
    assert len(seen.out.diagnostics["du_dt_rms"]) == k


def test_without_rows_below_the_diagonal_there_is_no_derivative():
    times = UniformPair(off_diagonal_fraction=0.0)
    seen = watch(MeanFlow(times=times))
    assert len(seen.calls) == 1
    assert seen.out.diagnostics == {}


def test_diagonal_rows_are_flow_matching():
    """Loss and gradient, with the same times and noise; the sum over elements is twice the mean."""
    times = UniformPair(off_diagonal_fraction=0.0)
    seen = watch(MeanFlow(times=times, weight=Unweighted()))
    batch = random_batch(n=12, labels="given")

    def as_velocity(x, t, r, cond):
        return {"v": seen.net(x, t, r, cond)["u"]}

    rng = torch.Generator().manual_seed(0)
    reference = FlowMatching(times=times).loss(as_velocity, batch, rng)
    torch.testing.assert_close(seen.out.per_sample, 2 * reference.per_sample, rtol=0, atol=0)
    torch.testing.assert_close(seen.gradient(), seen.gradient(2 * reference.per_sample))


def test_floor_depends_on_both_times():
    """s^2 S_r^2 / S_t^4 in bins of r / t, where a wrong power of S would show."""
    batch = law_batch(GAUSSIAN, 40_000, 0)
    objective = MeanFlow(weight=Unweighted(), times=UniformPair(off_diagonal_fraction=1.0))
    out = objective.loss(GAUSSIAN, batch, torch.Generator().manual_seed(0))
    t, r = out.t.double()[:, None], out.r.double()[:, None]

    def variance(time):
        return (1 - time) ** 2 * GAUSSIAN.std**2 + time**2

    excess = out.per_sample - (GAUSSIAN.std**2 * variance(r) / variance(t) ** 2).sum(1)
    for low in (0.0, 0.25, 0.5, 0.75):
        rows = excess[(low <= out.r / out.t) & (out.r / out.t < low + 0.25)]
        assert len(rows) > 4000
        assert rows.mean().abs() < 4 * rows.std() / len(rows) ** 0.5


class Guided(torch.nn.Module):
    """The mixture's velocities under classifier-free guidance, as u on the diagonal."""

    shape = MIXTURE.shape

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, t, r, cond=None):
        null = MIXTURE.velocity(x, t)
        given = MIXTURE.velocity(x, t, cond) if cond else null
        return {"u": null + self.scale * (given - null)}


def diagonal_bias(objective, scale, monkeypatch):
    """Of a network that is guided with this scale, on rows with r = t."""
    times = UniformPair(off_diagonal_fraction=0.0)
    objective = replace(objective, times=times, weight=Unweighted())
    subject = Subject("mean_flow", lambda: objective)
    monkeypatch.setattr(Subject, "exact_field", lambda self, law: Guided(scale))
    return fixed_point.measure(subject, MIXTURE)


@pytest.mark.parametrize(
    ("omega", "kappa", "scale"), [(3.0, 0.0, 3.0), (1.0, 0.5, 2.0), (0.2, 0.92, 2.5)]
)
def test_guidance_scale_is_omega_over_one_minus_kappa(omega, kappa, scale, monkeypatch):
    objective = MeanFlow(omega=omega, kappa=kappa)
    assert diagonal_bias(objective, scale, monkeypatch).z < 4
    for wrong in (0.7 * scale, 1.3 * scale):
        assert diagonal_bias(objective, wrong, monkeypatch).z > 4


def test_guidance_needs_labels():
    with pytest.raises(ValueError, match="labels"):
        watch(MeanFlow(omega=2.0), labels="none")


@pytest.mark.slow
def test_adaptive_weight_moves_the_optimum_at_a_skewed_mixture():
    """Which is why the suite sets it aside; without it nothing moves, as the suite shows."""
    subject = Subject("mean_flow", lambda: MeanFlow(times=HALF))
    assert fixed_point.measure(subject, MIXTURE, exact=False).z > 4


@pytest.mark.parametrize("eps", [0.4, -0.4])
def test_fixed_point_notices_a_derivative_of_the_wrong_size(eps):
    """Far below the planted mistakes; smaller ones are left to the second opinion on the loss."""

    class Scaled(Turned):
        def __call__(self, fn, primals, tangents):
            return (1 + eps) * super().__call__(fn, primals, tangents)

    derivative = Scaled(lambda a, b, c: (a, b, c))
    subject = Subject("mean_flow", lambda: MeanFlow(times=HALF, derivative=derivative))
    assert run_claim("", fixed_point.at_gaussian, subject).status == "FAIL"


@pytest.mark.parametrize(
    ("field", "value"),
    [("kappa", 1.0), ("kappa", -0.1), ("guidance_interval", (0.5, 0.2))],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"^mean_flow\.{field} = "):
        MeanFlow(**{field: value})
