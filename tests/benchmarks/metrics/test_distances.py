"""Distances between vectors: closed forms, clean-fid's own numbers, and the guarded square root."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_frechet
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from benchmarks.metrics import distances
from benchmarks.metrics.distances import (
    Frechet,
    Kid,
    Mmd,
    frechet_distance,
    moments,
    symmetric_root,
)
from benchmarks.metrics.precision_recall import PrecisionRecall


def normal(n: int, d: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng, dtype=torch.float64) * scale + shift


def covariance(d: int, seed: int) -> torch.Tensor:
    factor = normal(d, d, seed)
    return factor @ factor.T / d + 0.1 * torch.eye(d)


def only(values) -> float:
    ((_, value),) = list(values)
    return value


@settings(max_examples=20, deadline=None)
@given(
    scales=st.lists(
        st.tuples(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(-3, 3)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 1000),
)
def test_frechet_is_the_closed_form_for_commuting_gaussians(scales, seed) -> None:
    first, second, shift = torch.tensor(scales, dtype=torch.float64).T
    turn = torch.linalg.qr(normal(len(first), len(first), seed)).Q
    root = turn @ torch.diag(first) @ turn.T
    other = turn @ torch.diag(second**2) @ turn.T
    found = frechet_distance(torch.zeros_like(shift), root, turn @ shift, other)
    wanted = float((shift**2 + (first - second) ** 2).sum())
    # the root of a rounding error of 1e-16 is 1e-8 of the largest product of scales
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-7 * float(first.max() * second.max()))


def test_frechet_equals_cleanfid_on_well_conditioned_covariances() -> None:
    (one, two), (m1, m2) = (covariance(20, 1), covariance(20, 2)), normal(2, 20, 3)
    ours = frechet_distance(m1, symmetric_root(one), m2, two)
    with pytest.warns(DeprecationWarning, match="disp"):  # clean-fid's own use of scipy
        theirs = cleanfid_frechet(m1.numpy(), one.numpy(), m2.numpy(), two.numpy())
    assert ours == pytest.approx(theirs, rel=1e-10)


def test_frechet_with_fewer_samples_than_dimensions_is_the_nuclear_norm_form() -> None:
    """tr (S1 S2)^1/2 is the sum of the singular values of A B^T, S = A^T A: no square root."""
    spread = torch.logspace(0, -3, 60, dtype=torch.float64)
    a, b = normal(20, 60, 1) * spread, normal(25, 60, 2) * spread.flip(0) + 0.1
    factors = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    overlap = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() - 2 * overlap
    wanted = float(wanted + sum(f.square().sum() for f in factors))
    assert only(Frechet()(a, b)) == pytest.approx(wanted, rel=1e-6)


def test_frechet_of_samples_without_common_directions_adds_their_spreads() -> None:
    turn = torch.linalg.qr(normal(40, 40)).Q
    a, b = normal(50, 40, 1), normal(50, 40, 2)
    a[:, 20:], b[:, :20] = 0, 0
    wanted = float((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum())
    assert only(Frechet()(a @ turn, b @ turn)) == pytest.approx(wanted, rel=1e-7)


def test_frechet_of_a_set_with_itself_is_zero_and_symmetric_otherwise() -> None:
    a, b = normal(30, 50, 1), normal(30, 50, 2, scale=2)
    assert abs(only(Frechet()(a, a))) < 1e-8  # 1e-6 with the roots of noise in 21 empty dimensions
    assert only(Frechet()(a, b)) == pytest.approx(only(Frechet()(b, a)), rel=1e-8)


def test_square_root_of_what_is_no_covariance_is_refused() -> None:
    with pytest.raises(ArithmeticError, match="cannot be negative"):
        symmetric_root(torch.diag(torch.tensor([1.0, -1e-6], dtype=torch.float64)))


def test_square_root_notices_a_solver_that_returns_other_eigenvalues(monkeypatch) -> None:
    right = linalg.eigh

    def wrong(matrix):
        values, vectors = right(matrix)
        return values * 1.001, vectors

    monkeypatch.setattr(linalg, "eigh", wrong)
    with pytest.raises(ArithmeticError, match="miss the trace"):
        symmetric_root(covariance(10, 1))


def test_moments_are_numpys() -> None:
    x = normal(10, 3)
    mean, cov = moments(x.float())
    np.testing.assert_allclose(mean, x.numpy().mean(0), atol=1e-6)
    np.testing.assert_allclose(cov, np.cov(x.numpy().T), atol=1e-6)


def test_kid_equals_its_definition_and_leaves_numpys_generator_alone() -> None:
    a, b = normal(12, 5, 1), normal(9, 5, 2, shift=0.5)

    def kernel(x, y):
        return (x @ y.T / 5 + 1) ** 3

    def off_diagonal_mean(x):
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    np.random.seed(7)
    wanted_draw = np.random.rand()
    np.random.seed(7)
    value = only(Kid()(a, b))
    assert np.random.rand() == wanted_draw
    wanted = off_diagonal_mean(a) + off_diagonal_mean(b) - 2 * kernel(a, b).mean()
    assert value == pytest.approx(float(wanted), rel=1e-10)


def test_kid_leaves_sets_that_do_not_fit_to_clean_fid(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("cleanfid.fid.kernel_distance", lambda *a, **sizes: calls.append(sizes))
    for size in (12, 11):
        list(Kid(max_subset_size=size, num_subsets=3)(normal(9, 2), normal(12, 2)))
    assert calls == [{"num_subsets": 3, "max_subset_size": 11}]


def test_kid_of_sets_that_fit_is_clean_fids() -> None:
    from cleanfid.fid import kernel_distance

    a, b = normal(12, 5, 1), normal(12, 5, 2, shift=0.5)
    theirs = kernel_distance(b.numpy(), a.numpy(), num_subsets=1, max_subset_size=12)
    assert only(Kid()(a, b)) == pytest.approx(theirs, rel=1e-10)


def test_kid_over_subsets_is_reproducible_and_depends_on_its_seed() -> None:
    a, b = normal(40, 3, 1), normal(60, 3, 2)
    kid = Kid(max_subset_size=10, num_subsets=3)
    assert only(kid(a, b)) == only(kid(a, b))
    assert only(kid(a, b)) != only(Kid(max_subset_size=10, num_subsets=3, seed=1)(a, b))


@pytest.mark.parametrize("metric", [Kid(), Mmd()])
def test_unbiased_distances_are_zero_on_average_between_equal_laws(metric) -> None:
    values = torch.tensor(
        [only(metric(normal(20, 2, 2 * i), normal(20, 2, 2 * i + 1))) for i in range(300)]
    )
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * error  # the biased estimate is off by 20 errors and more
    moved = [only(metric(normal(20, 2, i), normal(20, 2, i + 50, shift=1))) for i in range(30)]
    assert np.mean(moved) > 20 * error


def test_mmd_equals_the_closed_form_for_gaussians() -> None:
    """E k(x, y) = s (s^2 + 2)^-1/2 exp(-m^2 / 2 (s^2 + 2)) for x - y ~ N(m, 2) and width s."""
    a, b = normal(3000, 1, 1), normal(3000, 1, 2, shift=1.0)
    mean = [0.7 / math.sqrt(2.49) * math.exp(-m / (2 * 2.49)) for m in (0, 1)]
    # the estimate's standard error at n = 3000 is about 0.008
    assert only(Mmd(bandwidths=(0.7,))(a, b)) == pytest.approx(2 * (mean[0] - mean[1]), abs=0.03)


def brute_force(fake, real, k: int) -> dict[str, float]:
    """The four definitions, by loops."""
    fake, real = fake.tolist(), real.tolist()
    radius = {
        id(x): sorted(math.dist(x, y) for y in points if y is not x)[k - 1]
        for points in (fake, real)
        for x in points
    }

    def held(x, by):
        return [math.dist(x, y) <= radius[id(y)] for y in by]

    covered = [min(math.dist(x, y) for y in fake) <= radius[id(x)] for x in real]
    return {
        "precision": np.mean([any(held(x, real)) for x in fake]),
        "recall": np.mean([any(held(x, fake)) for x in real]),
        "density": np.mean([sum(held(x, real)) for x in fake]) / k,
        "coverage": np.mean(covered),
    }


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(5, 25),
    m=st.integers(5, 25),
    k=st.integers(1, 4),
    block=st.sampled_from([1, 4, 100]),
    shift=st.floats(0, 3),
)
def test_precision_recall_density_coverage_equal_their_definitions(n, m, k, block, shift) -> None:
    fake, real = normal(n, 3, 1, shift=shift), normal(m, 3, 2)
    found = dict(PrecisionRecall(k=k, block=block)(fake, real))
    assert found == pytest.approx(brute_force(fake, real, k), abs=1e-6)


def test_a_collapsed_model_has_precision_without_recall_or_coverage() -> None:
    real = normal(200, 4, 1)
    found = dict(PrecisionRecall()(real[:1] + 1e-3 * normal(200, 4, 2), real))
    assert found["precision"] == 1
    assert found["recall"] < 0.02
    assert found["coverage"] < 0.2


def test_an_overdispersed_model_has_recall_without_precision() -> None:
    found = dict(PrecisionRecall()(normal(300, 4, 1, scale=4), normal(300, 4, 2)))
    assert found["recall"] > 0.9
    assert found["precision"] < 0.3


def test_precision_recall_of_many_rows_is_that_of_some_evenly_spaced() -> None:
    real, fake = normal(300, 4, 1), normal(200, 4, 2)
    expected = dict(PrecisionRecall()(fake[::2], real[::3]))
    assert dict(PrecisionRecall(max_rows=100)(fake, real)) == expected
    assert dict(PrecisionRecall(max_rows=300)(fake, real)) == dict(PrecisionRecall()(fake, real))


@pytest.mark.parametrize("metric", [Frechet(), Kid(), PrecisionRecall(), Mmd()])
def test_broken_input_is_refused(metric) -> None:
    good = normal(10, 3)
    bad = good.clone()
    bad[4, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 10"):
        list(metric(bad, good))
    with pytest.raises(ValueError, match="samples"):
        list(metric(good[:1], good))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Kid(max_subset_size=1),
        lambda: Kid(num_subsets=0),
        lambda: PrecisionRecall(k=0),
        lambda: PrecisionRecall(block=0),
        lambda: PrecisionRecall(max_rows=3),
        lambda: Mmd(bandwidths=()),
        lambda: Mmd(bandwidths=(1.0, 0.0)),
    ],
)
def test_impossible_settings_are_refused_at_construction(make) -> None:
    with pytest.raises(ValueError):
        make()


def test_precision_recall_needs_more_samples_than_neighbours() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        list(PrecisionRecall()(normal(3, 2), normal(10, 2)))


def test_numpy_seed_is_restored_after_an_error() -> None:
    np.random.seed(3)
    wanted = np.random.rand()
    np.random.seed(3)
    with pytest.raises(RuntimeError), distances._numpy_seed(0):
        raise RuntimeError
    assert np.random.rand() == wanted


def test_frechet_of_many_dimensions_says_that_it_takes_long(caplog, monkeypatch):
    monkeypatch.setattr("benchmarks.metrics.distances.MANY", 3)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    list(Frechet()(x[:, :3], x[:, :3]))
    assert not caplog.text
    list(Frechet()(x, x))
    assert "frechet of vectors of 4 dimensions" in caplog.text
