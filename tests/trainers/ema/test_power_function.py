"""Profiles of averaged weights, and the mixture of stored ones that is nearest to another."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn

from trainers.ema.averages import PowerEma
from trainers.ema.power_function import WIDEST, Profile, ProfileMixture, exponent, mixture

WIDTHS = (0.05, 0.1)
widths = st.floats(0.02, 0.28)


def exact_weights(profile: Profile, steps: int, k: float | None = None) -> np.ndarray:
    """How much the weights after each of `steps` updates count, float64 [steps]."""
    k = exponent(profile.sigma_rel) if k is None else k
    ends = np.minimum(np.arange(steps + 1) / profile.step, 1.0) ** (k + 1)
    return np.diff(ends)


# --- profiles


@given(sigma_rel=st.floats(0.004, 0.2886))
def test_exponent_gives_a_profile_of_the_relative_width(sigma_rel: float) -> None:
    n = 20_000  # 80 of them under the narrowest peak
    weights = exact_weights(Profile(n, sigma_rel), n)
    place = (np.arange(n) + 0.5) / n
    mean = weights @ place
    spread = np.sqrt(weights @ (place - mean) ** 2)
    assert weights.sum() == pytest.approx(1)
    assert spread == pytest.approx(sigma_rel, rel=1e-4)  # the grid's steps
    other = exact_weights(Profile(n, sigma_rel), n, exponent(sigma_rel) + 1)
    assert np.sqrt(other @ (place - other @ place) ** 2) != pytest.approx(sigma_rel, rel=1e-4)


def test_exponent_is_that_of_the_paper_at_its_widths() -> None:
    """Its figures: 0.05 and 0.1 are the exponents 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, WIDEST, 0.5, 5.0, float("nan")])
def test_width_out_of_range_is_refused_with_the_range(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"above 0 and below 0.2887"):
        exponent(sigma_rel)


def test_running_average_weighs_steps_as_its_profile() -> None:
    """Weights that are a unit vector, another at each step: the average shows what each counts."""
    steps = 60
    for sigma_rel in (0.03, 0.1, 0.25):
        net = nn.Linear(steps, 1, bias=False)
        ema = PowerEma(net, sigma_rel)
        for step in range(steps):
            with torch.no_grad():
                net.weight.copy_(torch.eye(steps)[step])
            ema.update(step)
        found = ema.net.weight[0].double().numpy()
        wanted = exact_weights(Profile(steps, sigma_rel), steps)
        # 60 float32 updates of numbers below 1; nothing is left of the initial weights
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        other = exact_weights(Profile(steps, sigma_rel), steps, exponent(sigma_rel) + 1)
        assert abs(found - other).max() > 1e-3


@pytest.mark.parametrize("power", [1, 3])
def test_running_average_of_a_polynomial_is_its_closed_form(power: int) -> None:
    """theta(s) = (s/T)^m has the average (k + 1) / (k + m + 1), up to order 1/T."""
    net, steps = nn.Linear(1, 1, bias=False), 2000
    ema = PowerEma(net, 0.1)
    for step in range(steps):
        with torch.no_grad():
            net.weight.fill_(((step + 1) / steps) ** power)
        ema.update(step)
    k = exponent(0.1)
    found = ema.net.weight.item()
    assert found == pytest.approx((k + 1) / (k + power + 1), rel=2e-3)
    assert found != pytest.approx((k + 2) / (k + power + 2), rel=2e-3)


@given(widths, widths, st.integers(1, 1000), st.integers(1, 1000))
def test_overlap_is_the_integral_of_the_product(w: float, z: float, s: int, t: int) -> None:
    k, m = exponent(w), exponent(z)

    def product(x: float) -> float:
        return (k + 1) * (m + 1) / (s * t) * (x / s) ** k * (x / t) ** m

    expected, _ = quad(product, 0, min(s, t), limit=200)
    one, other = Profile(s, w), Profile(t, z)
    assert one.overlap(other) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert one.overlap(other) == other.overlap(one)


# --- combinations


def grid(steps: Iterable[int], stored: Iterable[float] = WIDTHS) -> list[Profile]:
    return [Profile(step, sigma_rel) for step in steps for sigma_rel in stored]


def of_weights(combination: ProfileMixture, profiles: list[Profile], steps: int) -> np.ndarray:
    rows = [exact_weights(profile, steps) for profile in profiles]
    return np.array(combination.coefficients) @ np.array(rows)


@settings(deadline=None)
@given(
    sigma_rel=st.floats(0.03, 0.25),
    count=st.integers(2, 24),
    share=st.floats(0.1, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_reconstruction_is_no_further_off_than_its_error_says(
    sigma_rel: float, count: int, share: float, seed: int
) -> None:
    """Cauchy-Schwarz, for any trajectory: |avg' - avg| <= error |p| |theta|, up to a constant."""
    steps = 240
    profiles = grid(sorted({max(1, steps * (i + 1) // count) for i in range(count)}))
    wanted = Profile(max(1, int(share * steps)), sigma_rel)
    found = mixture(profiles, wanted)
    assert sum(found.coefficients) == pytest.approx(1, abs=1e-9)
    rng = np.random.default_rng(seed)
    theta = np.cumsum(rng.normal(size=steps)) + 100  # the 100 is reproduced, as the sum is 1
    off = (of_weights(found, profiles, steps) - exact_weights(wanted, steps)) @ theta
    norm = np.sqrt(wanted.overlap(wanted) * ((theta - theta.mean()) ** 2).sum())
    assert abs(off) <= found.error * norm + 1e-6  # roundings of 100 by coefficients up to 50


def test_mixture_is_the_closest_of_sum_one() -> None:
    """Its error is that of the densities on a fine grid, and no change of sum 0 lowers it."""
    n, wanted = 40_000, Profile(960, 0.15)
    profiles = grid(range(120, 961, 120))
    place = (np.arange(n) + 0.5) * wanted.step / n

    def density(profile: Profile) -> np.ndarray:
        k = exponent(profile.sigma_rel)
        inside = place <= profile.step
        return (k + 1) / profile.step * np.where(inside, place / profile.step, 0.0) ** k

    rows, target = np.array([density(p) for p in profiles]), density(wanted)

    def error(x: np.ndarray) -> float:
        return float(np.linalg.norm(x @ rows - target) / np.linalg.norm(target))

    found = mixture(profiles, wanted)
    best = np.array(found.coefficients)
    assert error(best) == pytest.approx(found.error, rel=1e-2)  # the grid's steps
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 1e-1):
        change = rng.normal(size=len(best))
        assert error(best + size * (change - change.mean())) > error(best)


def test_mixture_at_stored_widths_is_the_stored_one() -> None:
    profiles = grid(range(50, 1601, 50))
    for number, profile in list(enumerate(profiles))[::7]:
        found = mixture(profiles, profile)
        assert found.error == 0
        assert np.flatnonzero(found.coefficients).tolist() == [number]
        beside = mixture(profiles, Profile(profile.step, profile.sigma_rel * (1 + 1e-7)))
        # the solved system goes over into it; its condition is 1e5
        np.testing.assert_allclose(beside.coefficients, found.coefficients, atol=1e-4)


def test_more_snapshots_and_nearer_widths_are_better() -> None:
    def error(sigma_rel: float, count: int) -> float:
        return mixture(grid(range(960 // count, 961, 960 // count)), Profile(960, sigma_rel)).error

    for sigma_rel in (0.03, 0.07, 0.15, 0.25):
        errors = [error(sigma_rel, count) for count in (4, 8, 16, 32)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.04
    assert error(0.02, 16) > 0.1 > error(0.03, 16) > error(0.07, 16)
