"""Which metrics the real side of an evaluation allows, and what real images score themselves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

import registry
from benchmarks.evaluation.reference import Real
from benchmarks.metrics.distances import Frechet, Values, VectorMetric
from benchmarks.metrics.feature_metrics import named
from registry.protocols import Extractor

log = logging.getLogger(__name__)


def usable(real: Real, extractor: Extractor, dim: int) -> Real:
    """The part of the real side that goes with features of this dimension."""
    if real.mean is None:
        return real
    if len(real.mean) == dim:
        if real.resize and getattr(extractor, "resize", real.resize) != real.resize:
            log.warning(
                "the reference's statistics are %s's; for the number that papers compare: "
                "--set \"inception_v3.resize = '%s'\"",
                "clean-fid" if real.resize == "clean" else "ADM",
                real.resize,
            )
        return real
    if real.images is None:
        raise ValueError(
            f"the reference {real.about} has statistics of {len(real.mean)} features and "
            f"{extractor.label} has {dim}; take a reference with images, or other --features"
        )
    return Real(about=real.about, num=real.num, images=real.images)


def possible(metrics: Sequence[VectorMetric], real: Real, asked: bool) -> list[VectorMetric]:
    """Those that the real side allows; ValueError if others were asked for by name."""
    if real.images is not None or real.features is not None:
        return list(metrics)
    possible: list[VectorMetric] = [metric for metric in metrics if isinstance(metric, Frechet)]
    if others := [registry.metrics.name_of(m) for m in metrics if m not in possible]:
        message = f"{', '.join(others)} need images, and {real.about} has statistics alone"
        if asked:
            raise ValueError(message)
        log.warning("%s: left out", message)
    return possible


def check_numbers(
    metrics: Sequence[VectorMetric], num: int, dim: int, real: Real, target: Tensor | None
) -> None:
    """ValueError unless `num` samples of `dim` features can be held against the real features."""
    names, least = ", ".join(map(registry.metrics.name_of, metrics)), least_rows(metrics)
    if num < least:
        raise ValueError(f"{names} need at least {least} samples, not {num}")
    if target is None:
        return
    if len(target) < least:
        raise ValueError(f"{names} need at least {least} real images, and {real.about} has less")
    if target.shape[1] != dim:
        raise ValueError(
            f"the reference {real.about} has {target.shape[1]} features and a sample has {dim}: "
            "give images of the samples' size, or the folder of them, which are brought to it"
        )


def least_rows(metrics: Sequence[VectorMetric]) -> int:
    return max(2, *(getattr(metric, "k", 0) + 1 for metric in metrics))


def against(metric: VectorMetric, real: Real, target: Tensor | None) -> Callable[[Tensor], Values]:
    if isinstance(metric, Frechet) and real.mean is not None and real.covariance is not None:
        return metric.against_moments(real.mean, real.covariance)
    assert target is not None, "metrics without a reference were refused"
    return metric.against(target)


def floors(
    metrics: Sequence[VectorMetric], target: Tensor | None, extractor: Extractor
) -> Iterator[tuple[str, float]]:
    if target is None or len(target) < 2 * max(4, least_rows(metrics)):
        return
    half = len(target) // 2  # by turns, since folders are sorted by class
    for metric in metrics:
        for name, value in metric.against(target[0::2][:half])(target[1::2][:half]):
            kind = "floor" if metric.better == "lower" else "ceiling"
            yield f"{named(name, extractor)}_{kind}", value
