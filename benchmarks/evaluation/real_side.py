"""The real side of an evaluation: the reference as each extractor sees it, and what it allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.evaluation.feature_cache import FeatureSink, fill
from benchmarks.evaluation.reference import Real, find_real
from benchmarks.evaluation.reference_checks import (
    check_numbers,
    possible,
    usable,
    with_enough_rows,
)
from benchmarks.evaluation.samples import Samples, rounded, rounding
from benchmarks.metrics.distances import VectorMetric
from benchmarks.metrics.features import Extractor
from trainers import ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class RealSide:
    """The reference over one extractor, and the metrics that can be measured against it.

    `features` [n d] are None where the reference has statistics alone, and in all processes but
    the first, which alone works out values.
    """

    extractor: Extractor
    real: Real
    features: Tensor | None
    metrics: tuple[VectorMetric, ...]

    def about(self) -> dict[str, Any]:
        """What the values over this extractor depend on."""
        if self.features is None:
            rows: dict[str, Any] = {"reference_rows": "statistics", "floor": ""}
        else:
            floor = "even rows of the reference against odd ones"
            rows = {"reference_rows": len(self.features), "floor": floor}
        return {"reference": self.real.about, **rows, **self.extractor.provenance()}


def real_sides(
    samples: Samples, extractors: Sequence[Extractor], metrics: Sequence[VectorMetric]
) -> list[RealSide]:
    """The real side over each extractor.

    This precedes all sampling, so that the error about a weight file that does not fit, or about a
    reference that lacks something, comes at once.
    """
    request = samples.request
    real = find_real(request.reference, samples.real, samples.shape, request.num)
    blank = rounded(torch.zeros(1, *samples.shape), samples.shape).to(samples.device)
    sides = []
    for extractor in extractors:
        dim = extractor(blank).shape[1]
        part = usable(real, extractor, dim)
        allowed = possible(metrics, part, bool(request.metrics))
        features = _features(part, extractor, samples)
        asked = bool(request.metrics or request.reference)
        allowed = with_enough_rows(allowed, part, features, asked)
        check_numbers(allowed, request.num, dim, part, features)
        sides.append(
            RealSide(extractor=extractor, real=part, features=features, metrics=tuple(allowed))
        )
    return sides


def _features(real: Real, extractor: Extractor, samples: Samples) -> Tensor | None:
    if real.features is not None or real.images is None:
        return real.features
    wanted = real.images
    sink = FeatureSink(
        cache=samples.request.reference_cache,
        about={"images": real.about, **rounding(samples.shape), **extractor.provenance()},
        num=real.num,
        extractor=extractor,
    )

    def images(first: int, count: int) -> Tensor:
        return rounded(wanted(first, count), samples.shape).to(samples.device)

    fill([sink], real.num, images, f"real images, {extractor.label}")
    return sink.load() if ranks.leads() else None
