"""Every registered path: end points, derivatives and conversions, in float32 and float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zoo  # noqa: F401  registers the paths
from registry import paths
from zoo.ops import like
from zoo.paths import time_at

# A conversion is one 2x2 solve of a well-conditioned system: some tens of roundings.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}

each_path = pytest.mark.parametrize("name", paths.names())
properties = settings(max_examples=25, deadline=None)
dtypes = st.sampled_from(list(TOLERANCE))
shapes = st.sampled_from([(4, 2), (3, 1, 2, 2), (1, 5), (2,)])
seeds = st.integers(0, 2**31 - 1)


def draw(shape, dtype, seed):
    """Data, noise and times, one row of the times at each end."""
    rng = torch.Generator().manual_seed(seed)
    x0, x1 = (torch.randn(shape, generator=rng, dtype=dtype) for _ in range(2))
    t = torch.rand(shape[0], generator=rng, dtype=dtype)
    t[0], t[-1] = 0, 1
    return x0, x1, t


@each_path
@properties
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_conversions_invert_the_path(name, shape, dtype, seed):
    path, (x0, x1, t) = paths.build(name), draw(shape, dtype, seed)
    sample = path.sample(x0, x1, t)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(path.to_x0(sample.x_t, sample.velocity, t), x0, **close)
    torch.testing.assert_close(path.to_x1(sample.x_t, sample.velocity, t), x1, **close)
    torch.testing.assert_close(path.to_velocity(x0, x1, t), sample.velocity, **close)


@each_path
@properties
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_any_state_and_velocity_come_back(name, shape, dtype, seed):
    """(x_t, velocity) -> (x0, x1) -> (x_t, velocity), for pairs that no sampling made."""
    path, (x_t, velocity, t) = paths.build(name), draw(shape, dtype, seed)
    x0, x1 = path.to_x0(x_t, velocity, t), path.to_x1(x_t, velocity, t)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    again = path.sample(x0, x1, t)
    torch.testing.assert_close(again.x_t, x_t, **close)
    torch.testing.assert_close(again.velocity, velocity, **close)


@each_path
@properties
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_ends_are_exact(name, shape, dtype, seed):
    path, (x0, x1, t) = paths.build(name), draw(shape, dtype, seed)
    assert torch.equal(path.sample(x0, x1, torch.zeros_like(t)).x_t, x0)
    assert torch.equal(path.sample(x0, x1, torch.ones_like(t)).x_t, x1)


@each_path
@properties
@given(dtype=dtypes, seed=seeds)
def test_coefficients_derivatives_match_autograd(name, dtype, seed):
    path = paths.build(name)
    t = draw((9, 1), dtype, seed)[2].requires_grad_()
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@each_path
@properties
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_velocity_is_the_derivative_of_the_point(name, shape, dtype, seed):
    path, (x0, x1, t) = paths.build(name), draw(shape, dtype, seed)
    x_t, derivative = torch.func.jvp(lambda t: path.sample(x0, x1, t).x_t, (t,), (t * 0 + 1,))
    sample = path.sample(x0, x1, t)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(sample.velocity, derivative, **close)
    torch.testing.assert_close(sample.x_t, x_t, **close)


@each_path
@properties
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_shape_and_dtype_are_those_of_the_data(name, shape, dtype, seed):
    path, (x0, x1, t) = paths.build(name), draw(shape, dtype, seed)
    sample = path.sample(x0, x1, t)
    outputs = [sample.x_t, sample.velocity]
    outputs += [path.to_x0(*outputs, t), path.to_x1(*outputs, t), path.to_velocity(x0, x1, t)]
    assert all(out.shape == x0.shape and out.dtype == dtype for out in outputs)


@each_path
@properties
@given(shape=shapes, seed=seeds)
def test_rows_are_independent(name, shape, seed):
    path, (x0, x1, t) = paths.build(name), draw(shape, torch.float64, seed)
    whole = path.sample(x0, x1, t)
    alone = path.sample(x0[:1], x1[:1], t[:1])
    assert torch.equal(whole.x_t[:1], alone.x_t)
    assert torch.equal(whole.velocity[:1], alone.velocity)


@each_path
def test_noise_grows_from_data_to_noise(name):
    path, t = paths.build(name), torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (path.alpha(t).diff() < 0).all()
    assert (path.sigma(t).diff() > 0).all()


def test_linear_conversions_are_the_formulas_of_the_specification():
    """x0 = x_t - t v, x1 = x_t + (1 - t) v, v = x1 - x0: written out, not through the 2x2 solve."""
    x0, x1, t = draw((6, 3), torch.float64, 0)
    path = paths.build("linear")
    v, time = x1 - x0, like(t, x0)
    sample = path.sample(x0, x1, t)
    torch.testing.assert_close(sample.x_t, (1 - time) * x0 + time * x1)
    torch.testing.assert_close(sample.velocity, v)
    torch.testing.assert_close(path.to_x0(sample.x_t, v, t), sample.x_t - time * v)
    torch.testing.assert_close(path.to_x1(sample.x_t, v, t), sample.x_t + (1 - time) * v)


def test_trigflow_keeps_unit_variance():
    """The circle: alpha^2 + sigma^2 = 1, so unit-variance data stay so."""
    path, t = paths.build("trigflow"), torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


@each_path
def test_time_of_a_ratio_is_found_to_rounding(name):
    path, t = paths.build(name), torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    ratio = path.sigma(t) / path.alpha(t)
    for near in (t, t + 0.04, 0 * t + 0.5):
        torch.testing.assert_close(time_at(path, ratio, near), t, rtol=1e-12, atol=1e-12)
