"""What the reference of an evaluation allows: which extractors, metrics and numbers of samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

import registry
from benchmarks.evaluation.reference import Real
from benchmarks.metrics.distances import MomentMetric, VectorMetric
from benchmarks.metrics.feature_metrics import rows_needed
from benchmarks.metrics.features import Resizing
from registry.protocols import Extractor

log = logging.getLogger(__name__)


def usable(real: Real, extractor: Extractor, dim: int) -> Real:
    """The part of the reference that can be compared with features of this dimension.

    Statistics of another dimension are left out; ValueError where they are all that there is.
    """
    if real.mean is None:
        return real
    if len(real.mean) == dim:
        if real.resize and isinstance(extractor, Resizing) and extractor.resize != real.resize:
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


def possible(metrics: Sequence[VectorMetric], real: Real, by_name: bool) -> list[VectorMetric]:
    """The metrics that the reference allows; ValueError if another one was asked for by name."""
    if real.images is not None or real.features is not None:
        return list(metrics)
    by_moments: list[VectorMetric] = [m for m in metrics if isinstance(m, MomentMetric)]
    if others := [registry.metrics.name_of(m) for m in metrics if m not in by_moments]:
        message = f"{', '.join(others)} need images, and {real.about} has statistics alone"
        if by_name:
            raise ValueError(message)
        log.warning("%s: left out", message)
    return by_moments


def with_enough_rows(
    metrics: Sequence[VectorMetric], real: Real, target: Tensor | None, asked: bool
) -> list[VectorMetric]:
    """The metrics for which `target`, the real rows, are enough.

    The others are left out with a warning. ValueError if the metrics or the reference were `asked`
    for, and if none is left.
    """
    if target is None:
        return list(metrics)
    few = [metric for metric in metrics if rows_needed(metric) > len(target)]
    if few:
        names = ", ".join(map(registry.metrics.name_of, few))
        message = (
            f"{names} need at least {least_rows(few)} real images, and {real.about} has "
            f"{len(target)}"
        )
        if asked or len(few) == len(metrics):
            raise ValueError(f"{message}. Give a --reference with more")
        log.warning("%s: left out", message)
    return [metric for metric in metrics if metric not in few]


def check_numbers(
    metrics: Sequence[VectorMetric], num: int, dim: int, real: Real, target: Tensor | None
) -> None:
    """ValueError unless `num` samples of `dim` features can be compared with the real `target`."""
    names, least = ", ".join(map(registry.metrics.name_of, metrics)), least_rows(metrics)
    if num < least:
        raise ValueError(f"{names} need at least {least} samples, not {num}")
    if target is None:
        return
    if target.shape[1] != dim:
        raise ValueError(
            f"the reference {real.about} has {target.shape[1]} features and a sample has {dim}: "
            "give images of the samples' size, or the folder of them, which are brought to it"
        )


def least_rows(metrics: Sequence[VectorMetric]) -> int:
    """How many rows the metrics need on each side, the most demanding one deciding."""
    return max([2, *map(rows_needed, metrics)])
