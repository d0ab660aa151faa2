"""Metrics of samples against data: features once, several distances, and what real data score.

Every value is named after its features and comes with the number that real data score against
real data at the same count, since a distance of few samples is mostly bias: "fd_efficientnetlite0"
beside "fd_efficientnetlite0_floor". Only over InceptionV3 features is the distance called "fid".
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from benchmarks.metrics.distances import Frechet, Kid, NeedsRows, Values, VectorMetric
from benchmarks.metrics.features import best_available
from benchmarks.metrics.precision_recall import PrecisionRecall
from registry import metrics as metric_kinds
from registry.protocols import Extractor

log = logging.getLogger(__name__)


@metric_kinds.register("feature_metrics")
@dataclass(frozen=True, kw_only=True)
class FeatureMetrics:
    """Metrics over the features of one extractor, with their real-versus-real floor.

    With N samples, the reference is the first N rows that are given (all, if fewer). The floor is
    the next N rows against it, N being the same on both sides. Given fewer than 2N rows, it is one
    half of the reference against the other, at about N/2; the provenance says so, since that
    overstates the floor of a biased distance. A metric that needs more rows than the data have is
    left out with a warning, so that a few pictures can be trained on; so is a floor that needs more
    rows than there are.
    """

    extractor: Extractor | None = None  # None: best_available for the samples' shape
    metrics: tuple[VectorMetric, ...] = (Frechet(), Kid(), PrecisionRecall())

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.metrics:
            raise ValueError(
                "feature_metrics.metrics is empty; give at least one, such as @frechet()"
            )
        try:
            hash(self)  # results are remembered by what computed them
        except TypeError as error:
            raise ValueError(
                f"feature_metrics needs an extractor and metrics that are frozen dataclasses of "
                f"plain values: {error}"
            ) from None
        for metric in self.metrics:
            if (better := getattr(metric, "better", None)) not in ("lower", "higher"):
                raise ValueError(
                    f"feature_metrics.metrics has {type(metric).__name__}, which declares better = "
                    f"{better!r}; a metric of features needs better: ClassVar = 'lower' or 'higher'"
                )

    def __call__(self, samples: Tensor, reference: Tensor) -> Values:
        real = self._real(reference, len(samples))
        features = real.extractor(samples)
        for compare in real.comparisons:
            for name, value in compare(features):
                yield named(name, real.extractor), value

    def floor(self, reference: Tensor, num: int) -> Values:
        """What real data score: "<name>_floor", or "<name>_ceiling" where higher is better."""
        yield from self._real(reference, num).floor

    def provenance(self, reference: Tensor, num: int) -> dict[str, str]:
        """What the values for `num` samples depend on, by name."""
        real = self._real(reference, num)
        return {
            "samples": str(num),
            "reference": f"{real.num} rows, sha256 {real.digest[:16]}",
            "floor": real.floor_rule,
            "metrics": ", ".join(repr(metric) for metric in real.metrics) or "none",
            **real.extractor.provenance(),
        }

    def _real(self, reference: Tensor, num: int) -> _Real:
        return _prepare(self, _Rows(_digest(reference), reference), num)


@dataclass(frozen=True)
class _Rows:
    """A tensor that is equal to another by its content."""

    digest: str
    data: Tensor = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Real:
    """What is worked out once for a reference and a number of samples."""

    extractor: Extractor
    metrics: tuple[VectorMetric, ...]  # those for which there are rows enough
    comparisons: tuple[Callable[[Tensor], Values], ...]
    num: int
    digest: str
    floor: tuple[tuple[str, float], ...]
    floor_rule: str


@lru_cache(maxsize=4)  # the arms of a comparison share it, and every evaluation of a run
def _prepare(wanted: FeatureMetrics, rows: _Rows, num: int) -> _Real:
    extractor = wanted.extractor or best_available(tuple(rows.data.shape[1:]))
    features = extractor(rows.data[: 2 * num])
    target = features[:num]
    _check_enough(wanted.metrics, num)
    metrics = _possible(wanted.metrics, len(target))
    comparisons = tuple(metric.against(target) for metric in metrics)
    judges: tuple[tuple[VectorMetric, Callable[[Tensor], Values]], ...]
    if len(features) >= 2 * num:
        other, judges = features[num:], tuple(zip(metrics, comparisons, strict=True))
        rule = f"the next {num} rows against the reference"
    else:
        half = len(features) // 2
        other = features[half : 2 * half]
        judging = [metric for metric in metrics if rows_needed(metric) <= half]
        judges = tuple((metric, metric.against(features[:half])) for metric in judging)
        rule = f"halves of the {len(features)} rows, {half} each: fewer than 2 x {num} were given"
    floor = tuple(
        (floor_name(name, metric, extractor), value)
        for metric, compare in judges
        for name, value in compare(other)
    )
    return _Real(extractor, metrics, comparisons, len(target), rows.digest, floor, rule)


def _check_enough(metrics: tuple[VectorMetric, ...], num: int) -> None:
    """ValueError where so few samples were asked for that a metric cannot be had from any data."""
    for metric in metrics:
        if (needed := rows_needed(metric)) > num:
            raise ValueError(
                f"{metric_kinds.name_of(metric)} needs at least {needed} samples, and {num} are "
                f"drawn; give run.num_samples = {needed} or more, or take it out of "
                "feature_metrics.metrics"
            )


def _possible(metrics: tuple[VectorMetric, ...], rows: int) -> tuple[VectorMetric, ...]:
    """The metrics for which this many rows of real data are enough; the others are warned of."""
    for metric in metrics:
        if rows_needed(metric) > rows:
            log.warning(
                "%s needs at least %d real samples, and the data have %d: it is left out",
                *(metric_kinds.name_of(metric), rows_needed(metric), rows),
            )
    return tuple(metric for metric in metrics if rows_needed(metric) <= rows)


def rows_needed(metric: VectorMetric) -> int:
    """How many rows the metric needs on each side."""
    return metric.least_rows if isinstance(metric, NeedsRows) else 2


def named(name: str, extractor: Extractor) -> str:
    """What a metric's value is called over these features."""
    return extractor.canonical.get(name, f"{name}_{extractor.label.lower()}")


def floor_name(name: str, metric: VectorMetric, extractor: Extractor) -> str:
    """What the score of real data is called: "fid_floor", or "recall_pixels_ceiling"."""
    return f"{named(name, extractor)}_{'floor' if metric.better == 'lower' else 'ceiling'}"


def _digest(x: Tensor) -> str:
    content = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}".encode())
    content.update(x.detach().cpu().contiguous().numpy().data)
    return content.hexdigest()
