"""The values of an evaluation: of samples against real data, and of real data against itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from benchmarks.evaluation.real_side import RealSide
from benchmarks.evaluation.reference import Real
from benchmarks.evaluation.reference_checks import least_rows
from benchmarks.evaluation.samples import Samples
from benchmarks.metrics.distances import MomentMetric, Values, VectorMetric
from benchmarks.metrics.feature_metrics import floor_name, named


def scores(samples: Samples, sides: Sequence[RealSide]) -> dict[str, float]:
    """All values by name, "nfe4/fid" say, and after them what real images score, "fid_floor"."""
    values = {
        f"nfe{nfe}/{named(name, side.extractor)}": value
        for side in sides
        for nfe, name, value in _of_samples(samples, side)
    }
    return values | {name: value for side in sides for name, value in floors(side)}


def _of_samples(samples: Samples, side: RealSide) -> Iterator[tuple[int, str, float]]:
    comparisons = [against(metric, side.real, side.features) for metric in side.metrics]
    for nfe in samples.samplers:
        features = samples.features(nfe, side.extractor)
        for compare in comparisons:
            for name, value in compare(features):
                yield nfe, name, value


def against(
    metric: VectorMetric, real: Real, features: Tensor | None
) -> Callable[[Tensor], Values]:
    """The metric against the real side, by its statistics where the metric can use them."""
    if isinstance(metric, MomentMetric) and real.mean is not None and real.covariance is not None:
        return metric.against_moments(real.mean, real.covariance)
    assert features is not None, "metrics that need images were refused"
    return metric.against(features)


def floors(side: RealSide) -> Iterator[tuple[str, float]]:
    """What one half of the real rows scores against the other, where there are enough of them."""
    rows = side.features
    if rows is None or len(rows) < 2 * max(4, least_rows(side.metrics)):
        return
    half = len(rows) // 2  # every other row, since folders are sorted by class
    for metric in side.metrics:
        for name, value in metric.against(rows[0::2][:half])(rows[1::2][:half]):
            yield floor_name(name, metric, side.extractor), value
