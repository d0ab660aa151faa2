"""How two sets of vectors [n d] cover each other, by the balls to their k-th nearest neighbours.

precision, recall     share inside the other set's k-NN balls     Kynkaanniemi, arXiv 1904.06991
density, coverage     their forms robust to outliers              Naeem, arXiv 2002.09797

A point at the very radius of a ball counts as in the code of each metric's authors: inside for
precision and recall (github.com/kynkaat/improved-precision-and-recall-metric compares by <=), and
outside for density and coverage (github.com/clovaai/generative-evaluation-prdc compares by <). Such
ties are common: each copy of a training picture lies at the radius of others. So a distance that
rounding could move across a radius is computed again from the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.metrics.distances import Values, vectors
from registry import metrics, progress
from registry.protocols import Reference

BAR_FROM = 10_000  # rows from which on a bar shows
_SLACK = 1e-12  # of the squared lengths: more than the rounding of squared distances
_BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"  # the same bits for a pair in every call


@metrics.register("precision_recall")
@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Fidelity (precision, density) and diversity (recall, coverage) by k-nearest neighbours.

    The work grows with the square of the rows, so a side with more than `max_rows`, such as a whole
    ImageNet, is thinned to that many, evenly spaced. Published values are over at most 50,000.
    """

    reference: ClassVar = Reference(
        title="Improved Precision and Recall Metric for Assessing Generative Models",
        authors="Kynkaanniemi et al.",
        year=2019,
        arxiv="1904.06991",
    )
    better: ClassVar = "higher"

    k: int = 3
    block: int = 1000  # rows of the distance matrix at a time
    max_rows: int = 50_000

    def __post_init__(self) -> None:
        if self.k < 1 or self.block < 1 or self.max_rows <= self.k:
            raise ValueError(
                f"precision_recall.k = {self.k}, precision_recall.block = {self.block}, "
                f"precision_recall.max_rows = {self.max_rows}; k and block are at least 1, "
                "max_rows more than k"
            )

    @property
    def least_rows(self) -> int:
        return self.k + 1

    def against(self, reference: Tensor) -> Callable[[Tensor], Values]:
        target = vectors(self._spaced(reference))
        target_radii = self._radii(target)

        def compare(samples: Tensor) -> Values:
            found = vectors(self._spaced(samples))
            inside = torch.zeros(len(found), dtype=target.dtype)  # reference balls around each
            precise = torch.zeros(len(found), dtype=torch.bool)
            recalled = torch.zeros(len(target), dtype=torch.bool)
            nearest = torch.full((len(target),), torch.inf, dtype=target.dtype)
            radii = self._radii(found)
            for rows in self._blocks(torch.arange(len(found)), "nearest pictures"):
                distance = _distances(found[rows], target, radii[rows], target_radii)  # [rows m]
                inside[rows] = (distance < target_radii).sum(1).double()
                precise[rows] = (distance <= target_radii).any(1)
                recalled |= (distance <= radii[rows, None]).any(0)
                nearest = torch.minimum(nearest, distance.amin(0))
            yield "precision", float(precise.double().mean())
            yield "recall", float(recalled.double().mean())
            yield "density", float(inside.mean() / self.k)
            yield "coverage", float((nearest < target_radii).double().mean())

        return compare

    def __call__(self, samples: Tensor, reference: Tensor) -> Values:
        return self.against(reference)(samples)

    def _radii(self, x: Tensor) -> Tensor:
        """The distance from each row to its k-th nearest other row."""
        if len(x) <= self.k:
            raise ValueError(
                f"precision_recall.k = {self.k} needs more than {self.k} samples, not {len(x)}"
            )
        radii = []
        for part in self._blocks(x, "nearest neighbours"):
            place = torch.cdist(part, x).kthvalue(self.k + 1, dim=1).indices
            pairs = torch.cdist(part[:, None], x[place][:, None], compute_mode=_BY_DIFFERENCES)
            radii.append(pairs.flatten())
        return torch.cat(radii)

    def _spaced(self, x: Tensor) -> Tensor:
        if len(x) <= self.max_rows:
            return x
        return x[torch.arange(self.max_rows) * len(x) // self.max_rows]

    def _blocks(self, x: Tensor, label: str) -> Iterable[Tensor]:
        parts = x.split(self.block)
        return progress.bar(parts, label, worth=len(x) >= BAR_FROM, leave=False)


def _distances(rows: Tensor, target: Tensor, radii: Tensor, target_radii: Tensor) -> Tensor:
    """[n m], by a product of matrices, and by differences in the rows that come near a radius."""
    distance = torch.cdist(rows, target)
    slack = _SLACK * (rows.square().sum(1).amax() + target.square().sum(1).amax())
    near = torch.zeros(len(rows), dtype=torch.bool)
    for radius in (radii[:, None], target_radii):
        gap = distance.square().sub_(radius.square()).abs_()
        near |= gap.amin(1) <= slack
    distance[near] = torch.cdist(rows[near], target, compute_mode=_BY_DIFFERENCES)
    return distance
