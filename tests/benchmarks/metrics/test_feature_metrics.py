"""Metrics over features: names, what is shared, the real-versus-real floor and the provenance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from benchmarks.metrics.distances import Frechet, Kid, Mmd
from benchmarks.metrics.feature_metrics import FeatureMetrics
from benchmarks.metrics.features import EfficientNetLite0, Pixels
from benchmarks.metrics.precision_recall import PrecisionRecall
from registry import metrics


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Flattened values; counts the rows that it was asked for."""

    label: ClassVar = "Counted"
    canonical: ClassVar = {"fd": "fid"}
    rows: ClassVar[list[int]] = []

    key: int = 0  # to have an extractor of one's own in each test

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(images))
        return images.flatten(1)

    def provenance(self) -> dict[str, str]:
        return {"features": "the values", "resize": "none", "rounding": "none"}


def normal(n: int, seed: int, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_values_are_named_after_their_features() -> None:
    metric = FeatureMetrics(extractor=Pixels())
    names = [name for name, _ in metric(normal(10, 1), normal(20, 2))]
    kinds = ("fd", "kid", "precision", "recall", "density", "coverage")
    assert names == [f"{kind}_pixels" for kind in kinds]


def test_fid_is_the_name_of_canonical_features_alone() -> None:
    metric = FeatureMetrics(extractor=Counted(key=1), metrics=(Frechet(), Kid()))
    assert [name for name, _ in metric(normal(10, 1), normal(20, 2))] == ["fid", "kid_counted"]
    floors = [name for name, _ in metric.floor(normal(20, 2), 10)]
    assert floors == ["fid_floor", "kid_counted_floor"]
    names = [name for name, _ in FeatureMetrics(extractor=Pixels())(normal(10, 1), normal(20, 2))]
    assert not any(name.startswith("fid") for name in names)


def test_values_compare_with_the_first_rows_of_the_reference() -> None:
    samples, reference = normal(10, 1), normal(25, 2)
    (found,) = FeatureMetrics(extractor=Pixels(), metrics=(Frechet(),))(samples, reference)
    ((_, wanted),) = Frechet()(samples, reference[:10])
    assert found == ("fd_pixels", pytest.approx(wanted, rel=1e-6))


def test_floor_is_at_the_same_number_when_there_are_data_enough() -> None:
    reference = normal(25, 2)
    metric = FeatureMetrics(extractor=Pixels(), metrics=(Frechet(),))
    (found,) = metric.floor(reference, 10)
    ((_, wanted),) = Frechet()(reference[10:20], reference[:10])
    assert found == ("fd_pixels_floor", pytest.approx(wanted, rel=1e-6))
    assert metric.provenance(reference, 10)["floor"] == "the next 10 rows against the reference"


def test_floor_of_a_small_set_uses_halves_and_says_so() -> None:
    reference = normal(15, 2)
    metric = FeatureMetrics(extractor=Pixels(), metrics=(Frechet(),))
    (found,) = metric.floor(reference, 10)
    ((_, wanted),) = Frechet()(reference[7:14], reference[:7])
    assert found == ("fd_pixels_floor", pytest.approx(wanted, rel=1e-6))
    assert "halves of the 15 rows, 7 each" in metric.provenance(reference, 10)["floor"]


def test_more_samples_than_data_use_the_whole_reference() -> None:
    reference = normal(15, 2)
    metric = FeatureMetrics(extractor=Pixels(), metrics=(Kid(),))
    (found,) = metric(normal(40, 1), reference)
    ((_, wanted),) = Kid()(normal(40, 1), reference)
    assert found[1] == pytest.approx(wanted, rel=1e-6)
    about = metric.provenance(reference, 40)
    assert about["samples"] == "40"
    assert about["reference"].startswith("15 rows")


def test_real_data_give_a_ceiling_where_higher_is_better() -> None:
    metric = FeatureMetrics(extractor=Pixels(), metrics=(Mmd(), PrecisionRecall()))
    names = [name for name, _ in metric.floor(normal(20, 2), 10)]
    assert names[:2] == ["mmd_pixels_floor", "precision_pixels_ceiling"]


def test_reference_is_extracted_once_for_equal_contents() -> None:
    Counted.rows.clear()
    for seed in (1, 2, 3):  # three evaluations, each with a metric and a reference of its own
        metric = FeatureMetrics(extractor=Counted(key=2))
        list(metric(normal(10, seed), normal(20, 9)))
        list(metric.floor(normal(20, 9), 10))
    assert Counted.rows == [20, 10, 10, 10]


def test_another_reference_is_not_mistaken_for_the_first() -> None:
    metric = FeatureMetrics(extractor=Pixels(), metrics=(Frechet(),))
    samples, reference = normal(10, 1), normal(20, 2)
    (first,) = metric(samples, reference)
    reference[3, 2] += 1  # the same tensor, changed in place
    (second,) = metric(samples, reference)
    assert first != second
    assert metric.provenance(reference, 10) != metric.provenance(normal(20, 2), 10)


def test_provenance_carries_number_reference_rules_and_floor() -> None:
    extractor = EfficientNetLite0(size=32)
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    about = FeatureMetrics(extractor=extractor, metrics=(Kid(),)).provenance(images, 4)
    assert {"samples", "floor", "features", "weights", "resize", "rounding"} <= set(about)
    assert "sha256" in about["reference"]
    assert "Kid(" in about["metrics"]


def test_a_list_of_metrics_is_taken_and_an_empty_one_refused() -> None:
    assert FeatureMetrics(metrics=[Kid()]).metrics == (Kid(),)  # gin files may hold lists
    with pytest.raises(ValueError, match="empty"):
        FeatureMetrics(metrics=())


def test_parts_that_cannot_be_remembered_are_refused_at_construction() -> None:
    @dataclass
    class Loose:
        k: int = 3

    with pytest.raises(ValueError, match="frozen.*unhashable"):
        FeatureMetrics(extractor=Pixels(), metrics=(Loose(),))


def test_bandwidths_from_a_gin_file_may_be_a_list() -> None:
    assert FeatureMetrics(metrics=(Mmd(bandwidths=[0.5]),)).metrics[0].bandwidths == (0.5,)


def test_real_digits_are_closer_than_noise_in_every_metric() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits().images
    images = torch.from_numpy(digits[:120, None] / 8 - 1).float()
    metric = FeatureMetrics(extractor=EfficientNetLite0(size=32))
    noise = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fake = dict(metric(noise, images))
    real = {name.rsplit("_", 1)[0]: value for name, value in metric.floor(images, 40)}
    assert real["fd_efficientnetlite0"] < 0.5 * fake["fd_efficientnetlite0"]
    assert real["kid_efficientnetlite0"] < 0.1 * fake["kid_efficientnetlite0"]
    assert real["precision_efficientnetlite0"] > 0.5 > fake["precision_efficientnetlite0"]
    assert real["coverage_efficientnetlite0"] > 0.5 > fake["coverage_efficientnetlite0"]


def test_every_metric_is_registered() -> None:
    wanted = {"feature_metrics", "frechet", "kid", "mmd", "precision_recall"}
    assert wanted <= set(metrics.names())


@pytest.mark.parametrize(
    ("rows", "names", "floors"),
    [
        (1, set(), set()),
        (3, {"fd", "kid"}, set()),
        (5, {"fd", "kid", "precision", "recall", "density", "coverage"}, {"fd", "kid"}),
    ],
)
def test_metrics_for_which_there_is_too_little_real_data_are_left_out_aloud(
    rows, names, floors, caplog
) -> None:
    metric, real = FeatureMetrics(extractor=Pixels()), normal(rows, 40 + rows)
    values = dict(metric(normal(12, 4), real))
    assert {name.removesuffix("_pixels") for name in values} == names
    assert all(math.isfinite(value) for value in values.values())
    found = {name.removesuffix("_pixels_floor") for name, _ in metric.floor(real, 12)}
    assert found == floors
    recorded = metric.provenance(real, 12)["metrics"]
    assert ("PrecisionRecall" in recorded) == ("precision" in names)
    assert ("precision_recall needs at least 4 real samples" in caplog.text) == (rows < 4)


@pytest.mark.parametrize("better", [None, "more"])
def test_metric_that_says_no_direction_is_refused(better):
    made = type("Ours", (Frechet,), {"better": better})()
    with pytest.raises(ValueError, match=f"has Ours, which declares better = {better!r}"):
        FeatureMetrics(metrics=(made,))
