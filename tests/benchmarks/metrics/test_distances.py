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
    mean_and_factor,
    moments,
    nuclear_norm,
    symmetric_root,
)
from benchmarks.metrics.precision_recall import PrecisionRecall


def normal(n: int, d: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng, dtype=torch.float64) * scale + shift


def covariance(d: int, seed: int) -> torch.Tensor:
    factor = normal(d, d, seed)
    return factor @ factor.T / d + 0.1 * torch.eye(d)


def with_covariance(axes: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """2 d + 1 rows of mean zero whose covariance has these axes [d d] and variances [d]."""
    arms = (len(axes) * variances).sqrt()[:, None] * axes.T
    return torch.cat([arms, -arms, torch.zeros(1, len(axes), dtype=torch.float64)])


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
    other = turn @ torch.diag(second) @ turn.T
    found = frechet_distance(torch.zeros_like(shift), root, turn @ shift, other)
    wanted = float((shift**2 + (first - second) ** 2).sum())
    # rounding, of the largest scales: no root of a product is taken
    assert found == pytest.approx(
        wanted, rel=1e-12, abs=1e-13 * float(first.max() + second.max()) ** 2
    )


@pytest.mark.parametrize("decades", [4, 8, 12, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_frechet_is_exact_for_a_spectrum_that_falls_by_many_decades(decades, reverse) -> None:
    """Covariances with common axes: the distance is the sum of (sqrt a - sqrt b)^2."""
    turn = torch.linalg.qr(normal(60, 60)).Q
    first = torch.logspace(0, -decades, 60, dtype=torch.float64)
    second = first.flip(0) if reverse else 2 * first
    wanted = float((first.sqrt() - second.sqrt()).square().sum())
    rows = [with_covariance(turn, s) for s in (first, second)]
    assert only(Frechet()(*rows)) == pytest.approx(wanted, rel=1e-12)


def test_square_root_of_the_product_would_lose_the_end_of_a_steep_spectrum() -> None:
    """The negative control: with the eigenvalues of S1 S2, rounding hides what is below 1e-16."""
    turn = torch.linalg.qr(normal(60, 60)).Q
    first = torch.logspace(0, -12, 60, dtype=torch.float64)
    root = turn * first.sqrt() @ turn.T
    values = linalg.eigvalsh((root @ (root @ root) @ root).numpy())
    lost = float(first.sum()) - np.sqrt(values[values > 1e-15]).sum()
    assert lost > 1e-8
    assert abs(float(first.sum() - nuclear_norm(root @ root))) < 1e-13


def test_frechet_against_moments_of_a_steep_spectrum_is_the_closed_form() -> None:
    turn = torch.linalg.qr(normal(60, 60)).Q
    first = torch.logspace(0, -12, 60, dtype=torch.float64)
    compare = Frechet().against_moments(torch.zeros(60, dtype=torch.float64), turn * first @ turn.T)
    wanted = float((first.sqrt() - first.flip(0).sqrt()).square().sum())
    assert only(compare(with_covariance(turn, first.flip(0)))) == pytest.approx(wanted, rel=1e-11)


def test_frechet_of_covariances_without_common_axes_is_the_closed_form_in_the_plane() -> None:
    """tr (AB)^1/2 of 2 x 2 matrices is sqrt(tr AB + 2 sqrt(det A det B)), here steep ones."""
    roots = []
    for angle, small in ((0.3, 1e-5), (1.1, 1e-6)):
        c, s = math.cos(angle), math.sin(angle)
        roots.append(torch.tensor([[c, s], [-small * s, small * c]], dtype=torch.float64))
    a, b = (root.T @ root for root in roots)
    overlap = math.sqrt(float((a @ b).trace()) + 2 * 1e-5 * 1e-6)
    zero = torch.zeros(2, dtype=torch.float64)
    wanted = float(a.trace() + b.trace()) - 2 * overlap
    assert frechet_distance(zero, roots[0], zero, roots[1]) == pytest.approx(wanted, rel=1e-12)
    wrong = float(a.trace() + b.trace()) - 2 * float(roots[0].norm() * roots[1].norm())
    assert abs(wanted - wrong) > 0.1


def test_factor_of_many_rows_gives_their_covariance() -> None:
    x = normal(200, 7, scale=3.0, shift=5.0)  # eight blocks of 28 rows
    mean, factor = mean_and_factor(x)
    assert factor.shape == (7, 7)
    np.testing.assert_allclose(factor.T @ factor, np.cov(x.numpy().T), atol=1e-13)
    np.testing.assert_allclose(mean, x.mean(0))


def test_frechet_equals_cleanfid_on_well_conditioned_covariances() -> None:
    (one, two), (m1, m2) = (covariance(20, 1), covariance(20, 2)), normal(2, 20, 3)
    ours = frechet_distance(m1, symmetric_root(one), m2, symmetric_root(two))
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
    assert only(Frechet()(a, b)) == pytest.approx(wanted, rel=1e-13)


def test_frechet_of_samples_without_common_directions_adds_their_spreads() -> None:
    turn = torch.linalg.qr(normal(40, 40)).Q
    a, b = normal(50, 40, 1), normal(50, 40, 2)
    a[:, 20:], b[:, :20] = 0, 0
    wanted = float((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum())
    assert only(Frechet()(a @ turn, b @ turn)) == pytest.approx(wanted, rel=1e-7)


def test_frechet_of_a_set_with_itself_is_zero_and_symmetric_otherwise() -> None:
    a, b = normal(30, 50, 1), normal(30, 50, 2, scale=2)
    assert abs(only(Frechet()(a, a))) < 1e-12
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


def test_nuclear_norm_notices_a_solver_that_returns_other_values(monkeypatch) -> None:
    right = linalg.svdvals
    monkeypatch.setattr(linalg, "svdvals", lambda matrix: right(matrix) * 1.001)
    with pytest.raises(ArithmeticError, match="squares of the singular values"):
        nuclear_norm(covariance(10, 1))


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

    def well_inside(x, by):
        return [math.dist(x, y) < radius[id(y)] for y in by]

    covered = [min(math.dist(x, y) for y in fake) < radius[id(x)] for x in real]
    return {
        "precision": np.mean([any(held(x, real)) for x in fake]),
        "recall": np.mean([any(held(x, fake)) for x in real]),
        "density": np.mean([sum(well_inside(x, real)) for x in fake]) / k,
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


def test_ties_count_as_the_code_of_each_metrics_authors_counts_them() -> None:
    """On a line, with k = 1: every ball of the data has the radius 1."""
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]], dtype=torch.float64)
    fake = torch.tensor([[2.0], [9.0], [30.0], [31.0]], dtype=torch.float64)
    found = dict(PrecisionRecall(k=1)(fake, real))
    # 2 and 9 lie on the edges of the balls around 1 and 10. The balls around 2 and 9 have the
    # radius 7, those around 30 and 31 have the radius 1.
    assert found == {"precision": 0.5, "recall": 1.0, "density": 0.0, "coverage": 0.0}
    inside = dict(PrecisionRecall(k=1)(fake + torch.tensor([[-0.5], [0.5], [0], [0]]), real))
    assert (inside["precision"], inside["density"], inside["coverage"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_copies_of_the_data_tie_with_the_radii_to_the_bit(block, shift) -> None:
    """A copy has its k-th neighbour at the radius: k balls of others, its own not counted again.

    Distances by a product of matrices differ by rounding from one call to the next, the more the
    farther the points are from the origin, and would decide such ties at random.
    """
    real = normal(120, 6, 3, shift=shift)
    found = dict(PrecisionRecall(block=block)(real.flip(0), real))
    assert found == {"precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0}
    repeated = real[:30].repeat(4, 1)  # every radius is 0
    found = dict(PrecisionRecall(block=block)(repeated, repeated))
    assert found == {"precision": 1.0, "recall": 1.0, "density": 0.0, "coverage": 0.0}


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
