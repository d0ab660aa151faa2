"""Samplers at exact networks: calls, order, the law of restarts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.conformance.mutations import Recombined
from benchmarks.conformance.networks import OnPath, Tapped, Toy
from registry import samplers
from zoo.oracles import GaussianOracle, MixtureOracle
from zoo.paths import Linear, TrigFlow
from zoo.samplers import (
    Euler,
    FlowMap,
    Heun,
    Mix,
    OneStep,
    Restart,
    even_times,
    shifted,
)

F64 = torch.float64
GAUSSIAN = GaussianOracle([0.7, -1.0], [0.4, 1.5])
MIXTURE = MixtureOracle([[1.0, 0.0], [-1.0, 0.5]], [[0.4, 0.5], [0.5, 0.3]], [0.3, 0.7])
each = pytest.mark.parametrize("name", samplers.names())
in_several = pytest.mark.parametrize("name", [n for n in samplers.names() if n != "one_step"])


def noise(n=16, seed=0, dtype=F64):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(sampler, net, x1=None, cond=None, seed=0):
    x1 = noise() if x1 is None else x1
    with torch.no_grad():
        return sampler(net, x1, cond, torch.Generator().manual_seed(100 + seed))


def watch(sampler, x1=None, cond=None):
    net = Tapped(Toy((2,), ("u", "v")), 16)
    run(sampler, net, x1, cond)
    return net.calls


def exact(law, x1):
    one = torch.ones(len(x1), dtype=x1.dtype)
    return law.flow_map(x1, one, 0 * one)


@in_several
@settings(max_examples=15, deadline=None)
@given(nfe=st.integers(1, 12))
def test_declared_evaluations_are_the_counted_ones(name, nfe):
    sampler = samplers.get(name)(nfe=nfe)
    calls = watch(sampler)
    assert len(calls) == sampler.nfe == nfe
    assert all(((0 <= c.r) & (c.r <= c.t) & (c.t <= 1)).all() for c in calls)
    assert (calls[0].t == 1).all()


@in_several
def test_sampler_is_determined_by_its_arguments(name):
    sampler, net = samplers.get(name)(nfe=4), Toy((2,), ("u", "v"))
    before = torch.get_rng_state()
    one, same, other = (run(sampler, net, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same)
    assert torch.equal(one, other) == (name != "restart")


@in_several
def test_sampler_keeps_the_dtype_and_leaves_the_noise_alone(name):
    for dtype in (torch.float32, F64):
        x1 = noise(dtype=dtype)
        before = x1.clone()
        assert run(samplers.get(name)(nfe=3), Toy((2,), ("u", "v")), x1).dtype == dtype
        assert torch.equal(x1, before)


@in_several
@pytest.mark.parametrize("nfe", [1, 4])
def test_condition_reaches_every_call(name, nfe):
    label = torch.arange(16) % 2
    calls = watch(samplers.get(name)(nfe=nfe), cond={"label": label})
    assert len(calls) == nfe
    assert all(torch.equal(call.labels, label) for call in calls)


@in_several
def test_sampler_stays_on_the_device_of_the_noise(name):
    net, x1, rng = Toy((2,), ("u", "v")), noise(), torch.Generator()
    with torch.device("meta"):  # what a tensor gets that is told no device
        assert samplers.get(name)(nfe=3)(net, x1, None, rng).device.type == "cpu"


@pytest.mark.parametrize("law", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_flow_map_is_exact_in_any_number_of_steps(law, nfe):
    x1 = noise()
    torch.testing.assert_close(run(FlowMap(nfe=nfe), law, x1), exact(law, x1), rtol=0, atol=1e-8)


def test_flow_map_steps_on_an_even_grid():
    calls = watch(FlowMap(nfe=4))
    assert [float(c.t[0]) for c in calls] == [1, 0.75, 0.5, 0.25]
    assert [float(c.r[0]) for c in calls] == [0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(("cls", "order"), [(Euler, 1), (Heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_integrators_have_their_order(cls, order, shift):
    x1 = noise()
    errors = [
        float((run(cls(nfe=nfe, shift=shift), GAUSSIAN, x1) - exact(GAUSSIAN, x1)).abs().max())
        for nfe in (64, 128)
    ]
    assert abs(errors[0] / errors[1] - 2**order) < 0.15 * 2**order
    assert errors[1] < (0.1 if order == 1 else 2e-3)


def test_heun_is_the_trapezoidal_rule_and_ends_with_euler_if_odd():
    x1, full = noise(), torch.ones(16, dtype=F64)

    def v(x, t):
        return GAUSSIAN.velocity(x, t * full)

    ahead = x1 - v(x1, 1.0)
    torch.testing.assert_close(
        run(Heun(nfe=2), GAUSSIAN, x1), x1 - (v(x1, 1.0) + v(ahead, 0.0)) / 2
    )
    ahead = x1 - 0.5 * v(x1, 1.0)
    middle = x1 - 0.5 * (v(x1, 1.0) + v(ahead, 0.5)) / 2
    torch.testing.assert_close(run(Heun(nfe=3), GAUSSIAN, x1), middle - 0.5 * v(middle, 0.5))
    torch.testing.assert_close(run(Heun(nfe=1), GAUSSIAN, x1), run(Euler(nfe=1), GAUSSIAN, x1))


def test_integrators_read_v_and_else_u_on_the_diagonal():
    for cls in (Euler, Heun):
        calls = watch(cls(nfe=4))
        assert all(torch.equal(c.t, c.r) for c in calls)
    both, x1 = Toy((2,), ("u", "v")), noise()
    only_v = run(Euler(nfe=3), lambda *a: {"v": both(*a)["v"]}, x1)
    only_u = run(Euler(nfe=3), lambda *a: {"u": both(*a)["u"]}, x1)
    assert torch.equal(run(Euler(nfe=3), both, x1), only_v)
    assert not torch.equal(only_v, only_u)


@settings(max_examples=30)
@given(nfe=st.integers(1, 40), shift=st.floats(0.1, 10))
def test_shifted_times_fall_from_one_to_zero(nfe, shift):
    times = shifted(even_times(nfe), shift)
    assert len(times) == nfe + 1
    assert times[0] == pytest.approx(1)
    assert times[-1] == 0
    assert all(a > b for a, b in pairwise(times))
    middle = shifted([0.5], shift)[0]
    assert middle == pytest.approx(shift / (1 + shift))


def moments_agree(samples, law, limit=4.5):
    n = len(samples)
    mean = (samples.mean(0) - law.mean).abs() / (law.std / n**0.5)
    spread = (samples.var(0) / law.std**2 - 1).abs() / (2 / n) ** 0.5
    return float(torch.cat([mean, spread]).max()) < limit


@pytest.mark.parametrize("settings", [{"nfe": 2}, {"nfe": 2, "t_min": 0.3}, {"nfe": 5}])
def test_restart_preserves_the_law(settings):
    """At exact jumps; going back to the noise of the jump instead does not."""
    x1 = noise(20_000)
    assert moments_agree(run(Restart(**settings), GAUSSIAN, x1), GAUSSIAN)
    assert not moments_agree(run(Recombined(**settings), GAUSSIAN, x1), GAUSSIAN)


def test_deterministic_recombination_has_the_wrong_variance():
    """Data N(0, 1), second time 1/2: std 1 there instead of sqrt(1/2), so sqrt(2) at the end."""
    law = GaussianOracle([0.0, 0.0], [1.0, 1.0])
    samples = run(Recombined(nfe=2), law, noise(20_000))
    assert float(samples.std()) == pytest.approx(2**0.5, rel=0.02)
    assert float(run(Restart(nfe=2), law, noise(20_000)).std()) == pytest.approx(1, rel=0.02)


def test_restart_preserves_a_skewed_mixture():
    law = MixtureOracle(MIXTURE.means, MIXTURE.stds, MIXTURE.log_weights.exp(), rtol=1e-6)
    samples, data = run(Restart(nfe=3), law, noise(4000)), law.sample_x0(4000, torch.Generator())
    for power in (1, 2, 3):
        one, other = samples**power, data**power
        error = ((one.var(0) + other.var(0)) / 4000).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 4 * error).all()


def test_restart_jumps_to_the_data_from_falling_times():
    assert Restart(nfe=4).times() == [1.0, 0.75, 0.5, 0.25]
    assert Restart(nfe=3, t_min=0.4).times() == pytest.approx([1.0, 0.7, 0.4])
    assert Restart(nfe=1, t_min=0.4).times() == [1.0]
    calls = watch(Restart(nfe=3, t_min=0.4))
    assert [float(c.t[0]) for c in calls] == pytest.approx([1.0, 0.7, 0.4])
    assert all((c.r == 0).all() for c in calls)


def test_restart_adds_noise_along_its_path():
    network, x1 = OnPath(GAUSSIAN, TrigFlow()), noise(20_000)
    assert moments_agree(run(Restart(nfe=3, path=TrigFlow()), network, x1), GAUSSIAN)
    assert not moments_agree(run(Restart(nfe=3), network, x1), GAUSSIAN)


def test_restart_that_names_no_path_adds_noise_along_the_linear_one():
    x1 = noise()
    assert torch.equal(
        run(Restart(nfe=3), GAUSSIAN, x1), run(Restart(nfe=3, path=Linear()), GAUSSIAN, x1)
    )


def test_one_step_is_one_jump_from_the_noise_and_has_no_more():
    x1 = noise()
    assert torch.equal(run(OneStep(), GAUSSIAN, x1), run(FlowMap(nfe=1), GAUSSIAN, x1))
    assert [(float(c.t[0]), float(c.r[0])) for c in watch(OneStep())] == [(1, 0)]
    with pytest.raises(ValueError, match=r"^one_step\.nfe = 2 must be 1"):
        OneStep(nfe=2)


def test_mix_jumps_integrates_and_jumps():
    assert [(float(c.t[0]), float(c.r[0])) for c in watch(Mix(nfe=1))] == [(1, 0)]
    assert [(float(c.t[0]), float(c.r[0])) for c in watch(Mix(nfe=2))] == [(1, 0.5), (0.5, 0)]
    calls = [(float(c.t[0]), float(c.r[0])) for c in watch(Mix(nfe=4, t_switch=0.4))]
    wanted = [(1, 0.8), (0.8, 0.8), (0.6, 0.6), (0.4, 0)]  # Euler evaluates at r = t
    assert [x for pair in calls for x in pair] == pytest.approx([x for p in wanted for x in p])


def test_mix_is_exact_up_to_its_euler_steps():
    x1 = noise()
    for nfe in (1, 2):  # jumps alone
        torch.testing.assert_close(run(Mix(nfe=nfe), GAUSSIAN, x1), exact(GAUSSIAN, x1))
    errors = [
        float((run(Mix(nfe=nfe), GAUSSIAN, x1) - exact(GAUSSIAN, x1)).abs().max())
        for nfe in (33, 65)
    ]
    assert abs(errors[0] / errors[1] - 2) < 0.2


@each
@pytest.mark.parametrize("nfe", [0, -1, 2.5])
def test_impossible_numbers_of_evaluations_are_refused(name, nfe):
    with pytest.raises(ValueError, match=rf"^{name}\.nfe = "):
        samplers.get(name)(nfe=nfe)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Restart(t_min=0.0), "restart.t_min"),
        (lambda: Restart(t_min=1.0), "restart.t_min"),
        (lambda: Mix(t_switch=1.0), "mix.t_switch"),
        (lambda: Euler(shift=0.0), "euler.shift"),
        (lambda: Heun(shift=-1.0), "heun.shift"),
    ],
)
def test_impossible_settings_are_refused(make, field):
    with pytest.raises(ValueError, match=f"^{field} = "):
        make()
