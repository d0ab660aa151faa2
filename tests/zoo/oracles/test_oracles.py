"""The oracles, against computations that share nothing with their derivation.

Density from torch.distributions, conditional moments by quadrature, trajectories and their
Jacobians by scipy, derivatives by finite differences.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import distributions

from registry.protocols import NULL_LABEL
from zoo.derivatives.methods import Dual, Jvp
from zoo.ops import like
from zoo.oracles import GaussianOracle, MixtureOracle, Perturbed, WithBias
from zoo.oracles.solver import integrate

F64 = torch.float64

MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.4, -1.4]], dtype=F64)
STDS = torch.tensor([[0.2, 0.3], [0.5, 0.25], [0.3, 0.6]], dtype=F64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
LABELS = torch.tensor([0, 1, 0])

GAUSSIAN = GaussianOracle([0.7, -0.4], [0.3, 1.7])
MIXTURE = MixtureOracle(MEANS, STDS, WEIGHTS)
LABELLED = MixtureOracle(MEANS, STDS, WEIGHTS, labels=LABELS)
ORACLES = {"gaussian": GAUSSIAN, "mixture": MIXTURE}

each_oracle = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES.keys())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(oracle, n=24, seed=0):
    """x_t on the path, times inside (0, 1) and, in the first rows, r = t, t = 1 and r = 0."""
    rng = generator(seed)
    t = 0.05 + 0.9 * torch.rand(n, generator=rng, dtype=F64)
    r = t * torch.rand(n, generator=rng, dtype=F64)
    r[0], r[1], t[2] = t[0], 0, 1
    x0 = oracle.sample_x0(n, rng)
    x = like(1 - t, x0) * x0 + like(t, x0) * torch.randn(x0.shape, generator=rng, dtype=F64)
    return x, t, r


def assert_near(actual, expected, tolerance):
    """Within `tolerance` of the size of what is expected, or of 1."""
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def slope(f, h=1e-3):
    """f'(0), by the central difference of fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def log_density(oracle, x, t):
    """log p_t by torch.distributions, at one time t."""
    mean, std = (MEANS, STDS) if oracle is MIXTURE else (oracle.mean[None], oracle.std[None])
    weights = WEIGHTS if oracle is MIXTURE else torch.ones(1, dtype=F64)
    normal = distributions.Normal((1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2).sqrt())
    components = distributions.Independent(normal, 1)
    mixture = distributions.MixtureSameFamily(distributions.Categorical(weights), components)
    return mixture.log_prob(x)


def continuity_residual(oracle, velocity, x, t):
    """d log p/dt + v . grad log p + div v at one time: 0 iff v carries p_t along."""
    v, total = velocity(x, t), slope(lambda h: log_density(oracle, x, t + h))
    for i, e in enumerate(torch.eye(2, dtype=F64)):
        total = total + v[:, i] * slope(lambda h, e=e: log_density(oracle, x + h * e, t))
        total = total + slope(lambda h, e=e, i=i: velocity(x + h * e, t)[:, i])
    return total


@each_oracle
@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_velocity_obeys_the_continuity_equation(oracle, time):
    x = points(oracle)[0] * 0.8

    def velocity(x, t):
        return oracle.velocity(x, torch.full((len(x),), t, dtype=F64))

    # h^4 / 30 times a fifth derivative of up to 5 !/ .2^5.
    assert continuity_residual(oracle, velocity, x, time).abs().max() < 1e-6
    wrong = continuity_residual(oracle, lambda x, t: velocity(x, t) + 0.1 * x, x, time)
    assert wrong.abs().max() > 0.1


@pytest.mark.parametrize("time", [0.15, 0.5, 0.95])
def test_velocity_and_posterior_variance_are_the_conditional_moments(time):
    """E and Var of x1 - x0 = (x_t - x0) / t given x_t, by quadrature over x0, in one dimension."""
    means, stds, weights = MEANS[:, :1], STDS[:, :1], WEIGHTS
    oracle = MixtureOracle(means, stds, weights)
    x, grid = torch.linspace(-3, 3, 13, dtype=F64), torch.linspace(-8, 8, 20001, dtype=F64)
    prior = distributions.Normal(means, stds).log_prob(grid).exp()  # [k g]
    likelihood = distributions.Normal((1 - time) * grid, time).log_prob(x[:, None]).exp()
    posterior = (weights @ prior) * likelihood
    posterior = posterior / posterior.sum(1, keepdim=True)
    v_c = (x[:, None] - grid) / time
    mean = (posterior * v_c).sum(1)
    variance = (posterior * (v_c - mean[:, None]) ** 2).sum(1)
    t = torch.full_like(x, time)
    # The trapezoid rule is spectrally accurate for these Gaussians.
    assert_near(oracle.velocity(x[:, None], t)[:, 0], mean, 1e-10)
    assert_near(oracle.posterior_variance(x[:, None], t)[:, 0], variance, 1e-10)


@each_oracle
def test_density_matches_torch_distributions(oracle):
    x, t, _ = points(oracle)
    expected = torch.stack([log_density(oracle, a[None], s)[0] for a, s in zip(x, t, strict=True)])
    assert_near(oracle.log_density(x, t), expected, 1e-12)


@each_oracle
def test_score_is_the_gradient_of_the_log_density(oracle):
    x, t, _ = points(oracle)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(oracle.log_density(x, t).sum(), x)
    assert_near(oracle.score(x, t), expected, 1e-10)


@each_oracle
def test_score_and_velocity_determine_each_other(oracle):
    x, t, _ = points(oracle)
    time = like(t, x)
    expected = -(x + (1 - time) * oracle.velocity(x, t)) / time
    assert_near(oracle.score(x, t), expected, 1e-11)


@each_oracle
def test_velocity_jacobian_matches_autograd(oracle):
    x, t, _ = points(oracle)
    expected = torch.func.vmap(
        torch.func.jacrev(lambda x, t: oracle.velocity(x[None], t[None])[0])
    )(x, t)
    assert_near(oracle.velocity_jacobian(x, t), expected, 1e-11)


@each_oracle
def test_flow_map_and_its_jacobian_match_scipy(oracle):
    """dx/dt = v and dJ/dt = (dv/dx) J by scipy's own solver, row by row."""
    x, t, r = (z[:4] for z in points(oracle, seed=1))

    def right_side(time, state):
        position = torch.from_numpy(state[None, :2])
        time = torch.tensor([time], dtype=F64)
        jacobian = oracle.velocity_jacobian(position, time)[0] @ state[2:].reshape(2, 2)
        return np.concatenate([oracle.velocity(position, time)[0], jacobian.flatten()])

    for row in range(1, len(x)):
        start = np.concatenate([x[row], np.eye(2).ravel()])
        interval = (float(t[row]), float(r[row]))
        solution = solve_ivp(right_side, interval, start, "DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
        a, s, e = x[row : row + 1], t[row : row + 1], r[row : row + 1]
        assert_near(oracle.flow_map(a, s, e)[0], torch.from_numpy(solution[:2].copy()), 1e-8)
        columns = [
            Dual()(oracle.flow_map, (a, s, e), (d[None], s * 0, e * 0))[0]
            for d in torch.eye(2, dtype=F64)
        ]
        expected = torch.from_numpy(solution[2:].reshape(2, 2).copy())
        assert_near(torch.stack(columns, 1), expected, 1e-8)


@pytest.mark.parametrize(
    ("oracle", "name"),
    [
        (GAUSSIAN, "average_velocity"),
        (GAUSSIAN, "velocity"),
        (MIXTURE, "velocity"),
        # Many solutions; by default the identities of test_identities.py need these derivatives.
        pytest.param(MIXTURE, "average_velocity", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_forward_mode_derivatives_match_finite_differences(oracle, name):
    """Both forward modes, along x, t and r and jointly, also in the row with r = t."""
    x, t, r = points(oracle, n=6)
    a, zero = torch.randn(x.shape, generator=generator(2), dtype=F64), torch.zeros_like(t)
    one, f = torch.ones_like(t), getattr(oracle, name)
    rates = [(a, zero, zero), (0 * a, one, zero), (a, one, -0.5 * one)]
    if name == "velocity":
        primals, rates = (x, t), [rate[:2] for rate in rates]
    else:
        primals, rates = (x, t, r), [*rates, (0 * a, zero, one)]
    for rate in rates:
        expected = slope(
            lambda h, rate=rate: f(*(p + h * q for p, q in zip(primals, rate, strict=True)))
        )
        derivative = Dual()(f, primals, rate)
        # The stencil's error, h^4 / 30 of a fifth derivative; f varies over S_t >= 0.2.
        assert_near(derivative, expected, 1e-7)
        assert torch.equal(Jvp()(f, primals, rate), derivative)


@each_oracle
def test_reverse_mode_agrees_with_forward_mode(oracle):
    """Losses that differentiate through a target, not only the prediction, need it."""
    x, t, r = (z[:5] for z in points(oracle))
    direction = torch.randn(x.shape, generator=generator(3), dtype=F64)
    expected = Dual()(oracle.flow_map, (x, t, r), (direction, t * 0, r * 0)).sum()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(oracle.flow_map(x, t, r).sum(), x)
    assert_near((gradient * direction).sum(), expected, 1e-10)


@each_oracle
def test_average_velocity_is_smooth_where_r_meets_t(oracle):
    """u(x, t, t - h) = v - h/2 Dv/Dt + O(h^2): no digits are lost to a division by h."""
    x, t, _ = points(oracle)
    v = oracle.velocity(x, t)
    assert_near(oracle.average_velocity(x, t, t), v, 1e-14)
    acceleration = Dual()(oracle.velocity, (x, t), (v, torch.ones_like(t)))
    for h in (1e-9, 1e-7, 1e-5):
        expected = v - h / 2 * acceleration
        # h^2 / 6 times the third derivative of a trajectory, below 1e3 here.
        assert_near(oracle.average_velocity(x, t, t - h), expected, 1e-13 + 1e3 * h**2)


@each_oracle
def test_flow_map_is_a_semigroup_and_inverts(oracle):
    x, t, r = points(oracle)
    m = 0.3 * t + 0.7 * r
    end = oracle.flow_map(x, t, r)
    assert_near(oracle.flow_map(oracle.flow_map(x, t, m), m, r), end, 1e-10)
    assert_near(oracle.flow_map(end, r, t), x, 1e-8)  # the way back magnifies by up to 1/s


@each_oracle
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.8, 0.3)])
def test_flow_map_pushes_marginals_forward(oracle, start, end):
    n, rng = 4000, generator(4)
    if oracle is MIXTURE:
        oracle = MixtureOracle(MEANS, STDS, WEIGHTS, rtol=1e-5)  # far below the sampling error
    t, r = (torch.full((n,), s, dtype=F64) for s in (start, end))
    x0 = oracle.sample_x0(n, rng)
    x = (1 - start) * x0 + start * torch.randn(x0.shape, generator=rng, dtype=F64)
    moved = oracle.flow_map(x, t, r)
    mean, variance = oracle.marginal_mean(r[:1])[0], oracle.marginal_variance(r[:1])[0]
    squares = (moved - mean) ** 2
    assert ((moved.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((squares.mean(0) - variance).abs() < 4 * squares.std(0) / n**0.5).all()
    energy = oracle.log_density(moved, r)  # sensitive to the shape, not the moments alone
    direct = oracle.sample_x0(n, rng) * (1 - end)
    direct = direct + end * torch.randn(direct.shape, generator=rng, dtype=F64)
    expected = oracle.log_density(direct, r)
    error = (energy.var() / n + expected.var() / n).sqrt()
    assert (energy.mean() - expected.mean()).abs() < 4 * error


def test_gaussian_map_from_noise_to_data_is_affine():
    x = torch.randn(8, 2, generator=generator(), dtype=F64)
    one = torch.ones(8, dtype=F64)
    assert_near(GAUSSIAN.flow_map(x, one, 0 * one), GAUSSIAN.mean + GAUSSIAN.std * x, 1e-14)


def test_mixture_of_one_component_is_the_gaussian():
    """Also of two equal ones."""
    x, t, r = points(GAUSSIAN)
    mean, std = GAUSSIAN.mean, GAUSSIAN.std
    for k in (1, 2):
        mixture = MixtureOracle(mean.repeat(k, 1), std.repeat(k, 1), [3.0] * k)
        for key, value in GAUSSIAN(x, t, r).items():
            assert_near(mixture(x, t, r)[key], value, 1e-9)
        for name in ("score", "log_density", "posterior_variance", "velocity_jacobian"):
            assert_near(getattr(mixture, name)(x, t), getattr(GAUSSIAN, name)(x, t), 1e-12)
        for name in ("marginal_mean", "marginal_variance"):
            actual, expected = getattr(mixture, name)(t), getattr(GAUSSIAN, name)(t)
            assert_near(actual, expected.expand_as(actual), 1e-13)


@each_oracle
def test_marginal_moments_are_those_of_the_samples(oracle):
    n, rng = 20000, generator(5)
    t = torch.full((1,), 0.4, dtype=F64)
    x0 = oracle.sample_x0(n, rng)
    x = 0.6 * x0 + 0.4 * torch.randn(x0.shape, generator=rng, dtype=F64)
    mean, variance = oracle.marginal_mean(t)[0], oracle.marginal_variance(t)[0]
    squares = (x - mean) ** 2
    assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    assert ((squares.mean(0) - variance).abs() < 4 * squares.std(0) / n**0.5).all()


def test_flow_matching_floor_is_half_pi_times_the_std():
    """The integral of Var(v_c | x_t) over t is s pi / 2 per element."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t, weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    variance = GAUSSIAN.posterior_variance(torch.zeros(len(t), 2, dtype=F64), t)
    assert_near(weights @ variance, GAUSSIAN.std * math.pi / 2, 1e-10)


@pytest.mark.parametrize("label", [0, 1])
def test_label_restricts_to_the_components_of_its_class(label):
    x, t, r = points(LABELLED)
    of_class = label == LABELS
    alone = MixtureOracle(MEANS[of_class], STDS[of_class], WEIGHTS[of_class])
    cond = {"label": torch.full((len(x),), label)}
    for key, value in alone(x, t, r).items():
        assert_near(LABELLED(x, t, r, cond)[key], value, 1e-9)
    for name in ("score", "log_density", "posterior_variance", "velocity_jacobian"):
        assert_near(getattr(LABELLED, name)(x, t, cond), getattr(alone, name)(x, t), 1e-12)
    for name in ("marginal_mean", "marginal_variance"):
        assert_near(getattr(LABELLED, name)(t, cond), getattr(alone, name)(t), 1e-12)
    derivative = Dual()(lambda x: LABELLED.velocity(x, t, cond), (x,), (x,))
    assert_near(derivative, Dual()(lambda x: alone.velocity(x, t), (x,), (x,)), 1e-10)


def test_null_label_means_all_components_row_by_row():
    x, t, r = points(LABELLED)
    label = torch.full((len(x),), NULL_LABEL)
    label[::2] = 1
    mixed, none = LABELLED(x, t, r, {"label": label}), LABELLED(x, t, r)
    given = LABELLED(x, t, r, {"label": torch.ones_like(label)})
    for key in ("u", "v"):
        assert_near(none[key], MIXTURE(x, t, r)[key], 1e-12)
        assert_near(mixed[key][1::2], none[key][1::2], 1e-9)
        assert_near(mixed[key][::2], given[key][::2], 1e-9)


def test_label_without_a_component_is_refused():
    x, t, r = points(LABELLED, n=3)
    with pytest.raises(ValueError, match=r"label\(s\) \[5\].*classes are \[0, 1\]"):
        LABELLED(x, t, r, {"label": torch.tensor([0, 5, 1])})


def test_sampled_labels_belong_to_their_components():
    x0, cond = LABELLED.sample(4000, generator())
    label = cond["label"]
    share = (label == 1).double().mean()
    assert abs(share - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert_near(x0[label == 1].mean(0), MEANS[1], 4 * 0.5 / 2000**0.5)
    assert MIXTURE.sample(3, generator())[1] is None


@each_oracle
def test_samples_depend_on_the_generator_alone(oracle):
    state = torch.get_rng_state()
    assert torch.equal(oracle.sample_x0(9, generator(7)), oracle.sample_x0(9, generator(7)))
    assert not torch.equal(oracle.sample_x0(9, generator(7)), oracle.sample_x0(9, generator(8)))
    assert torch.equal(torch.get_rng_state(), state)


@each_oracle
def test_float32_in_float32_out(oracle):
    x, t, r = points(oracle)
    x, t, r = x.float(), t.float(), r.float()
    exact = oracle(x.double(), t.double(), r.double())
    for key, value in oracle(x, t, r).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact[key].float())


@each_oracle
def test_rows_are_independent(oracle):
    """To the solver's tolerance: the mixture's steps are shared by the batch."""
    x, t, r = points(oracle)
    whole, alone = oracle(x, t, r), oracle(x[5:7], t[5:7], r[5:7])
    assert_near(whole["u"][5:7], alone["u"], 1e-9)
    assert_near(whole["v"][5:7], alone["v"], 1e-14)


@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 2, 2)])
def test_samples_may_have_any_shape(shape):
    """An image-shaped oracle is the flat one, reshaped."""
    rng, size = generator(1), math.prod(shape)
    means = torch.randn(2, *shape, generator=rng, dtype=F64)
    stds = 0.3 + torch.rand(2, *shape, generator=rng, dtype=F64)
    for oracle, flat in (
        (GaussianOracle(means[0], stds[0]), GaussianOracle(means[0].flatten(), stds[0].flatten())),
        (
            MixtureOracle(means, stds, [1, 2]),
            MixtureOracle(means.flatten(1), stds.flatten(1), [1, 2]),
        ),
    ):
        x, t, r = points(oracle, n=4)
        assert oracle.shape == shape
        for key, value in oracle(x, t, r).items():
            assert_near(value, flat(x.flatten(1), t, r)[key].reshape(x.shape), 1e-12)
        for name in ("score", "posterior_variance"):
            expected = getattr(flat, name)(x.flatten(1), t).reshape(x.shape)
            assert_near(getattr(oracle, name)(x, t), expected, 1e-12)
        assert oracle.velocity_jacobian(x, t).shape == (4, size, size)
        assert oracle.flow_map(x, t, r).shape == x.shape
        assert oracle.marginal_variance(t).shape == (4, *shape)


def test_empty_batch_gives_an_empty_answer():
    x, t, r = points(MIXTURE, n=3)
    assert MIXTURE(x[:0], t[:0], r[:0])["u"].shape == (0, 2)


def test_solver_keeps_its_tolerance():
    """Rows with rates from 0.1 to 50: the error follows rtol over six orders."""
    rate = torch.logspace(-1, 1.7, 9, dtype=F64)[:, None]
    start = torch.ones(9, 1, dtype=F64)
    for rtol in (1e-6, 1e-9, 1e-12):
        end = integrate(lambda s, y: rate * (math.cos(3 * s) - y), start, rtol)
        a, w = rate, 3.0
        particular = a * (a * math.cos(w) + w * math.sin(w)) / (a**2 + w**2)
        exact = particular + (1 - a**2 / (a**2 + w**2)) * torch.exp(-a)
        assert (end - exact).abs().max() < 10 * rtol


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_state_that_is_not_finite_is_refused(bad):
    x, t, r = points(MIXTURE, n=3)
    x[1] = bad
    with pytest.raises(RuntimeError, match="not finite"):
        MIXTURE.average_velocity(x, t, r)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianOracle(0.0, 1.0), "shape of one sample"),
        (lambda: GaussianOracle([0.0, 1.0], [1.0]), "shape of one sample"),
        (lambda: GaussianOracle([0.0], [0.0]), "positive"),
        (lambda: MixtureOracle([0.0, 1.0], [1.0, 1.0], [1.0, 1.0]), r"\[k \*d\]"),
        (lambda: MixtureOracle(MEANS, STDS, [1.0, 1.0]), r"weights \(2,\)"),
        (lambda: MixtureOracle(MEANS, STDS, [1.0, 0.0, 1.0]), "positive"),
        (lambda: MixtureOracle(MEANS, -STDS, WEIGHTS), "positive"),
        (lambda: MixtureOracle(MEANS, STDS, WEIGHTS, labels=[0, 1]), "3 components"),
        (lambda: MixtureOracle(MEANS, STDS, WEIGHTS, labels=[0, 1, -1]), ">= 0"),
        (lambda: MixtureOracle(MEANS, STDS, WEIGHTS, rtol=1e-20), "rtol = 1e-20"),
    ],
)
def test_construction_says_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@each_oracle
@pytest.mark.parametrize("key", ["u", "v"])
def test_perturbed_shifts_one_output(oracle, key):
    x, t, r = points(oracle)
    exact, other = oracle(x, t, r), {"u": "v", "v": "u"}[key]
    shifted = Perturbed(oracle, 0.25, key)(x, t, r)
    assert_near(shifted[key] - exact[key], torch.full_like(x, 0.25), 1e-13)
    assert torch.equal(shifted[other], exact[other])
    direction = torch.tensor([0.0, 2.0], dtype=F64)
    shifted = Perturbed(oracle, 0.25, key, direction)(x, t, r)
    assert_near(shifted[key] - exact[key], 0.25 * direction.expand_as(x), 1e-13)
    with pytest.raises(KeyError, match="no output 'w'"):
        Perturbed(oracle, 0.25, "w")(x, t, r)


@each_oracle
def test_with_bias_starts_at_the_oracle_and_moves_along_its_features(oracle):
    x, t, r = points(oracle)
    net, exact = WithBias(oracle, 2), oracle(x, t, r)
    assert all(torch.equal(net(x, t, r)[key], exact[key]) for key in exact)
    with torch.no_grad():
        net.bias["u"] += 1
        net.matrix["v"][:, 2] = torch.tensor([1.0, -2.0])
    moved = net(x, t, r)
    assert_near(moved["u"] - exact["u"], torch.ones_like(x), 1e-13)
    product = like(t * r, x) * torch.tensor([1.0, -2.0], dtype=F64)
    assert_near(moved["v"] - exact["v"], product, 1e-13)


@each_oracle
def test_flow_matching_gradient_vanishes_at_the_oracle_only(oracle):
    """The use that WithBias is made for: mean gradients within 4 standard errors of 0."""

    def z_scores(shift, num_batches=60):
        rng, gradients = generator(9), []
        net = WithBias(Perturbed(oracle, shift, "v"), 2, keys=("v",))
        for _ in range(num_batches):
            x0, t = oracle.sample_x0(50, rng), torch.rand(50, generator=rng, dtype=F64)
            x1 = torch.randn(x0.shape, generator=rng, dtype=F64)
            x = like(1 - t, x0) * x0 + like(t, x0) * x1
            loss = (net(x, t, t)["v"] - (x1 - x0)).square().sum(1).mean()
            parts = torch.autograd.grad(loss, list(net.parameters()))
            gradients.append(torch.cat([g.flatten() for g in parts]))
        gradients = torch.stack(gradients)
        return gradients.mean(0) / (gradients.std(0) / num_batches**0.5)

    assert z_scores(0.0).abs().max() < 4
    assert z_scores(0.3).max() > 8
