"""Weights: values, slopes, and that the weight itself is a constant of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import weights
from zoo.weighting import Adaptive, LearnedLogvar, PseudoHuber, Unweighted

F64 = torch.float64
errors = st.floats(0, 1e4)
each = pytest.mark.parametrize("name", weights.names())


def outputs(n=1, logvar=0.0):
    return {"logvar": torch.full((n,), logvar, dtype=F64)}


def applied(weight, error, **kwargs):
    """(loss, d loss / d error) of one row."""
    e = torch.tensor([error], dtype=F64, requires_grad=True)
    loss = weight(e, outputs(**kwargs))
    (slope,) = torch.autograd.grad(loss.sum(), e)
    return float(loss.detach()), float(slope)


@each
def test_weight_acts_row_by_row_and_keeps_the_dtype(name):
    weight = weights.get(name)()
    error = torch.rand(6, generator=torch.Generator().manual_seed(0))
    out = {"logvar": torch.linspace(-1, 1, 6)}
    whole = weight(error, out)
    assert whole.shape == (6,)
    assert whole.dtype == torch.float32
    rows = [weight(error[i : i + 1], {"logvar": out["logvar"][i : i + 1]}) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(rows))


@each
@settings(max_examples=30)
@given(error=errors)
def test_larger_errors_push_and_none_pulls_the_other_way(name, error):
    loss, slope = applied(weights.get(name)(), error)
    assert math.isfinite(loss)
    assert slope > 0


@each
def test_weight_names_the_outputs_that_it_reads(name):
    weight = weights.get(name)()
    given_outputs = {key: torch.zeros(1) for key in type(weight).heads}
    weight(torch.ones(1), given_outputs)  # a KeyError if it reads another


@settings(max_examples=30)
@given(error=errors)
def test_unweighted_is_the_error(error):
    assert applied(Unweighted(), error) == (error, 1.0)


@settings(max_examples=30)
@given(error=errors, power=st.floats(0, 2), offset=st.floats(1e-4, 1))
def test_adaptive_divides_by_a_constant_power_of_the_error(error, power, offset):
    """The slope is the factor alone: no gradient runs through the weight."""
    factor = (error + offset) ** -power
    loss, slope = applied(Adaptive(power=power, offset=offset), error)
    assert loss == pytest.approx(error * factor)
    assert slope == pytest.approx(factor)


def test_adaptive_losses_are_flat():
    """Why the raw error is what gets logged."""
    assert applied(Adaptive(), 1.0)[0] == pytest.approx(1 / 1.01)
    assert applied(Adaptive(), 1000.0)[0] == pytest.approx(1, abs=1e-4)


@settings(max_examples=30)
@given(error=errors, c=st.floats(1e-3, 10))
def test_pseudo_huber_is_quadratic_then_linear(error, c):
    loss, slope = applied(PseudoHuber(c=c), error)
    assert loss == pytest.approx(math.sqrt(error + c**2) - c, abs=1e-9)
    assert slope == pytest.approx(0.5 / math.sqrt(error + c**2))
    assert loss <= error / (2 * c) + 1e-9
    assert loss <= math.sqrt(error) + 1e-9


@settings(max_examples=30)
@given(error=st.floats(1e-3, 100), logvar=st.floats(-3, 3))
def test_learned_log_variance_is_the_gaussian_likelihood(error, logvar):
    loss, slope = applied(LearnedLogvar(), error, logvar=logvar)
    assert loss == pytest.approx(error * math.exp(-logvar) + logvar)
    assert slope == pytest.approx(math.exp(-logvar))


@pytest.mark.parametrize("error", [0.1, 2.0])
def test_learned_log_variance_is_least_at_the_logarithm_of_the_error(error):
    best = applied(LearnedLogvar(), error, logvar=math.log(error))[0]
    for off in (-0.1, 0.1):
        assert applied(LearnedLogvar(), error, logvar=math.log(error) + off)[0] > best


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Adaptive(offset=0.0), "adaptive.offset"),
        (lambda: Adaptive(offset=-1.0), "adaptive.offset"),
        (lambda: PseudoHuber(c=0.0), "pseudo_huber.c"),
    ],
)
def test_impossible_settings_are_refused(make, field):
    with pytest.raises(ValueError, match=f"^{field} = "):
        make()
