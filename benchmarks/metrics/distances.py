"""Distances between two sets of vectors [n d].

    fd    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 ||R1 R2^T||_*,  S = R^T R    Heusel, arXiv 1706.08500
    kid   unbiased MMD^2 with the kernel (x.y / d + 1)^3                 Binkowski, arXiv 1801.01401

tr (S1 S2)^1/2, the last term of fd, is the sum of the singular values of R1 R2^T, in float64. No
square root of a product is taken: it would turn rounding of 1e-16 into 1e-8, once for each of the
small eigenvalues that most spectra end with, and general matrix square roots have returned wrong
values for nearly singular covariances. The R of samples come from the samples themselves, so that
only statistics from a file need the root of a covariance. fd is biased upwards at small N, kid is
not; only values at the same N compare.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from registry import metrics
from registry.protocols import Reference

MANY = 4096  # sizes of a matrix above which its singular values take minutes
_QR_BLOCK = 4  # times the dimensions: rows that are decomposed at a time

Values = Iterator[tuple[str, float]]

log = logging.getLogger(__name__)


@runtime_checkable
class VectorMetric(Protocol):
    """A metric that compares vectors [n d], and so the features of images.

    `against` does the work that depends on the reference alone, once for any number of samples.
    `better` is "lower" or "higher": what real data score is then called a floor or a ceiling.
    """

    better: ClassVar[str]

    def against(self, reference: Tensor) -> Callable[[Tensor], Values]: ...
    def __call__(self, samples: Tensor, reference: Tensor) -> Values: ...


@runtime_checkable
class MomentMetric(VectorMetric, Protocol):
    """A VectorMetric that needs no more of the reference than its mean [d] and covariance [d d]."""

    def against_moments(self, mean: Tensor, covariance: Tensor) -> Callable[[Tensor], Values]: ...


@runtime_checkable
class NeedsRows(Protocol):
    """A metric that needs more than two rows on each side."""

    @property
    def least_rows(self) -> int: ...


@metrics.register("frechet")
@dataclass(frozen=True, kw_only=True)
class Frechet:
    """Frechet distance between Gaussian fits; over InceptionV3 features it is the FID."""

    reference: ClassVar = Reference(
        title="GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        authors="Heusel et al.",
        year=2017,
        arxiv="1706.08500",
    )
    better: ClassVar = "lower"

    def against(self, reference: Tensor) -> Callable[[Tensor], Values]:
        return self._against(*mean_and_factor(reference))

    def against_moments(self, mean: Tensor, covariance: Tensor) -> Callable[[Tensor], Values]:
        """The distance to a mean [d] and covariance [d d] in float64, worked out before."""
        return self._against(mean, symmetric_root(covariance))

    def _against(self, mean: Tensor, factor: Tensor) -> Callable[[Tensor], Values]:
        if len(factor) > MANY:
            log.warning(
                "frechet of vectors of %d dimensions takes singular values of matrices of that "
                "size: minutes each, and %.1f GB. Bind features of fewer",
                *(len(mean), 4 * 8e-9 * len(factor) ** 2),
            )

        def compare(samples: Tensor) -> Values:
            yield "fd", frechet_distance(mean, factor, *mean_and_factor(samples))

        return compare

    def __call__(self, samples: Tensor, reference: Tensor) -> Values:
        return self.against(reference)(samples)


@metrics.register("kid")
@dataclass(frozen=True, kw_only=True)
class Kid:
    """Kernel distance (cubic polynomial), unbiased at any number of samples.

    Sets of up to `max_subset_size` are compared whole, which needs no drawing of subsets; larger
    ones by clean-fid, as the mean over `num_subsets` random subsets of that size.
    """

    reference: ClassVar = Reference(
        title="Demystifying MMD GANs", authors="Binkowski et al.", year=2018, arxiv="1801.01401"
    )
    better: ClassVar = "lower"

    max_subset_size: int = 5000
    num_subsets: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_subset_size < 2 or self.num_subsets < 1:
            raise ValueError(
                f"kid.max_subset_size = {self.max_subset_size}, kid.num_subsets = "
                f"{self.num_subsets}; give at least 2 and 1"
            )

    def against(self, reference: Tensor) -> Callable[[Tensor], Values]:
        target = vectors(reference)
        whole = _unbiased_mmd(_cubic, target) if len(target) <= self.max_subset_size else None

        def compare(samples: Tensor) -> Values:
            found = vectors(samples)
            if whole and len(found) <= self.max_subset_size:
                yield "kid", whole(found)
            else:
                yield "kid", self._over_subsets(found, target)

        return compare

    def _over_subsets(self, found: Tensor, target: Tensor) -> float:
        from cleanfid.fid import kernel_distance  # 2 s: it brings torchvision

        with _numpy_seed(self.seed):  # clean-fid draws its subsets from numpy's global state
            value: float = kernel_distance(
                target.numpy(),
                found.numpy(),
                num_subsets=self.num_subsets,
                max_subset_size=self.max_subset_size,
            )
        return value

    def __call__(self, samples: Tensor, reference: Tensor) -> Values:
        return self.against(reference)(samples)


@metrics.register("mmd")
@dataclass(frozen=True, kw_only=True)
class Mmd:
    """Unbiased MMD^2, the mean over Gaussian kernels of fixed widths; for 2-D data."""

    reference: ClassVar = Reference(
        title="A Kernel Two-Sample Test", authors="Gretton et al.", year=2012
    )
    better: ClassVar = "lower"

    bandwidths: tuple[float, ...] = (0.1, 0.3, 1.0)  # in the data's units

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidths", tuple(self.bandwidths))  # gin may hand over a list
        if not self.bandwidths or min(self.bandwidths) <= 0:
            raise ValueError(f"mmd.bandwidths = {self.bandwidths!r}; give positive widths")

    def against(self, reference: Tensor) -> Callable[[Tensor], Values]:
        distance = _unbiased_mmd(self._kernel, vectors(reference))

        def compare(samples: Tensor) -> Values:
            yield "mmd", distance(vectors(samples))

        return compare

    def __call__(self, samples: Tensor, reference: Tensor) -> Values:
        return self.against(reference)(samples)

    def _kernel(self, x: Tensor, y: Tensor) -> Tensor:
        squared = torch.cdist(x, y).square()
        kernels = [torch.exp(-squared / (2 * width**2)) for width in self.bandwidths]
        return torch.stack(kernels).mean(0)


def _unbiased_mmd(
    kernel: Callable[[Tensor, Tensor], Tensor], target: Tensor
) -> Callable[[Tensor], float]:
    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    within_target = within(target)
    return lambda x: float(within(x) + within_target - 2 * kernel(x, target).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [d] and unbiased covariance [d d] of x [n d], in float64, for a MomentMetric."""
    x = vectors(x)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def mean_and_factor(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [d] of x [n d] and a factor R [min(n, d) d] of its unbiased covariance R^T R.

    More rows than dimensions become the triangle of their QR decomposition, block by block.
    """
    x = vectors(x)
    mean = x.mean(0)
    rows = (x - mean) / (len(x) - 1) ** 0.5
    if len(rows) <= rows.shape[1]:
        return mean, rows
    factor = rows[:0]
    for part in rows.split(_QR_BLOCK * rows.shape[1]):
        factor = torch.linalg.qr(torch.cat([factor, part]), mode="r").R
    return mean, factor


def frechet_distance(mean: Tensor, factor: Tensor, other_mean: Tensor, other: Tensor) -> float:
    """Between N(mean, factor^T factor) and N(other_mean, other^T other), in float64.

    `factor` and `other` are [k d] for any k, such as the symmetric root of a covariance.
    """
    spread = factor.square().sum() + other.square().sum() - 2 * nuclear_norm(factor @ other.T)
    return float((mean - other_mean).square().sum() + spread)


def nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of the singular values; ArithmeticError if their squares do not add up."""
    values = torch.from_numpy(linalg.svdvals(matrix.numpy()))
    squared, wanted = float(values.square().sum()), float(matrix.square().sum())
    allowed = max(1000, *matrix.shape) * torch.finfo(matrix.dtype).eps * wanted
    if not abs(squared - wanted) <= allowed:
        raise ArithmeticError(
            f"the squares of the singular values add up to {squared:.6g} and those of the matrix "
            f"to {wanted:.6g}: check the linear algebra library with another build of SciPy"
        )
    return values.sum()


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance [d d].

    By SciPy: torch's eigh, with several threads, fails to converge on some of low rank.
    """
    values, vectors = map(torch.from_numpy, linalg.eigh(_symmetric(matrix).numpy()))
    return (vectors * _eigenvalues(matrix, values).sqrt()) @ vectors.T


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _eigenvalues(matrix: Tensor, values: Tensor) -> Tensor:
    """The eigenvalues `values` with those that may be rounding set to 0; larger faults raise.

    The square root would turn noise of 1e-16 into 1e-8, once for every dimension that the samples
    behind the covariance do not span.
    """
    epsilon = torch.finfo(values.dtype).eps * float(matrix.norm())
    lowest, off = float(values.min()), float((values.sum() - matrix.trace()).abs())
    allowed = max(1000, len(values)) * epsilon
    if not lowest >= -allowed or not off <= allowed:
        raise ArithmeticError(
            f"eigenvalues that cannot be negative go down to {lowest:.3g} and miss the trace by "
            f"{off:.3g}, where rounding allows {allowed:.3g}: check the linear algebra library "
            "with another build of torch"
        )
    return torch.where(values > 10 * epsilon, values, 0.0)


def vectors(x: Tensor) -> Tensor:
    """[n *d] -> [n d] float64 on the CPU, finite, at least two rows."""
    if len(x) < 2:
        raise ValueError(f"a distance needs at least 2 samples on each side, not {len(x)}")
    rows = x.detach().flatten(1).cpu().double()
    finite = rows.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"{int((~finite).sum())} of {len(x)} rows to compare are not finite")
    return rows


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
