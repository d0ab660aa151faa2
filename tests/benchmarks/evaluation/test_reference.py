"""What samples are compared with: data, pictures, statistics, and what is no reference."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation_runs import blocks, fd, grey_pictures, request

import registry
from benchmarks.evaluation.protocol import evaluate_run
from benchmarks.evaluation.reference import Real, find_real
from benchmarks.evaluation.reference_checks import (
    least_rows,
    possible,
    usable,
    with_enough_rows,
)
from benchmarks.evaluation.scores import against
from benchmarks.metrics import evaluate
from benchmarks.metrics.distances import Frechet, Kid, moments
from benchmarks.metrics.features import Pixels


def test_a_reference_of_another_size_than_the_samples_is_warned_of(tmp_path, caplog) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", arr_0=rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    find_real(str(tmp_path / "a.npz"), None, (3, 8, 8), 0)
    folder, _ = grey_pictures(tmp_path / "pictures")
    find_real(str(folder), None, (3, 8, 8), 0)
    assert not caplog.records
    find_real(str(tmp_path / "a.npz"), None, (3, 16, 16), 0)
    assert "have 8 x 8 pixels and the samples 16 x 16" in caplog.text
    find_real(str(folder), None, (3, 16, 16), 0)
    assert "smaller than 16 pixels and are enlarged" in caplog.text


def test_a_folder_an_npz_and_statistics_of_the_same_images_give_one_distance(
    run_folder, tmp_path
) -> None:
    folder, pixels = grey_pictures(tmp_path / "pictures")
    np.savez(tmp_path / "images.npz", arr_0=pixels[..., None])
    scaled = pixels / 127.5 - 1
    mean, covariance = moments(torch.from_numpy(scaled.reshape(40, -1)).float())
    np.savez(tmp_path / "moments.npz", mu=mean, sigma=covariance)
    for reference in (folder, tmp_path / "images.npz", tmp_path / "moments.npz"):
        how = {"num": 300, "nfe": (1,), "reference": str(reference), "metrics": ("frechet",)}
        values = evaluate_run(run_folder, request(tmp_path, **how), tmp_path / "out")
        (features,) = (torch.cat(list(blocks(tmp_path / "out").values())),)
        assert values["nfe1/fd_pixels"] == pytest.approx(fd(features, scaled), rel=1e-6)


def test_statistics_alone_leave_out_what_needs_images_and_say_so(
    run_folder, tmp_path, caplog
) -> None:
    np.savez(tmp_path / "moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    how = {"num": 20, "nfe": (1,), "reference": str(tmp_path / "moments.npz")}
    values = evaluate_run(run_folder, request(tmp_path, **how), tmp_path)
    assert set(values) == {"nfe1/fd_pixels"}
    assert "kid, precision_recall need images" in caplog.text
    with pytest.raises(ValueError, match=r"kid need images, and moments\.npz"):
        evaluate_run(run_folder, request(tmp_path, metrics=("kid",), **how), tmp_path)


def test_clean_fids_names_are_looked_up_in_local_folders(run_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OBJECTIVE_ZOO_WEIGHTS", str(tmp_path))
    ask = request(tmp_path, reference="cleanfid:toy_train_8", num=20, nfe=(1,))
    with pytest.raises(FileNotFoundError) as caught:
        evaluate_run(run_folder, ask, tmp_path)
    for part in ("toy_clean_train_8.npz", str(tmp_path), "cs.cmu.edu", "OBJECTIVE_ZOO_WEIGHTS"):
        assert part in str(caught.value)
    real = torch.randn(50, 64)
    mean, covariance = moments(real)
    np.savez(tmp_path / "toy_clean_train_8.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "toy_clean_train_8_kid.npz", feats=real)
    assert {"nfe1/fd_pixels", "nfe1/kid_pixels"} <= set(evaluate_run(run_folder, ask, tmp_path))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere", r"no folder of pictures and no \.npz.*cleanfid:cifar10_train_32"),
        ("cleanfid:cifar10", "cleanfid:NAME_SPLIT_SIZE"),
        ("empty.npz", "holds other; a reference holds mu"),
        ("text.npz", "cannot be read as arrays"),
        ("pickle.npz", "cannot be read as arrays"),
        ("wrong.npz", r"mu and sigma .* are \(3,\) and \(2, 2\)"),
        ("floats.npz", r"arr_0 .* float64"),
        ("other_size.npz", "statistics of 3 features and Pixels has 64"),
        ("negative.npz", "no covariance.* its lowest is -1"),
        ("lopsided.npz", "no covariance: it must be symmetric"),
        ("nan.npz", r"sigma in nan\.npz has values that are not finite: 4096 of 4096"),
        ("nan_mean.npz", r"mu in nan_mean\.npz has values that are not finite: 1 of 64"),
        ("inf.npz", r"sigma in inf\.npz .* not finite: 1 of 4096\. .* two or more samples"),
        ("one_sample.npz", r"sigma in one_sample\.npz .* not finite"),
        ("huge.npz", "so large that their squares are not finite"),
        ("words.npz", "mu in words.npz is <U1; it must be float16, 32 or 64"),
        ("complex.npz", "sigma in complex.npz is complex128"),
        ("nothing.npz", r"mu and sigma .* are \(0,\) and \(0, 0\)"),
        ("cut.npz", "cut.npz cannot be read as arrays"),
        ("array.npz", "array.npz cannot be read as arrays"),
        ("large.npz", "has 256 features and a sample has 64"),
        ("few.npz", "precision_recall need at least 4 real images"),
    ],
)
def test_a_reference_that_is_none_is_refused_before_sampling(
    run_folder, tmp_path, monkeypatch, reference, message
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("empty.npz", other=np.zeros(3))
    Path("text.npz").write_text("no zip")
    np.savez("pickle.npz", mu=np.array([print], dtype=object), sigma=np.eye(2))
    np.savez("wrong.npz", mu=np.zeros(3), sigma=np.eye(2))
    np.savez("floats.npz", arr_0=np.zeros((2, 8, 8, 3)))
    np.savez("other_size.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("negative.npz", mu=np.zeros(64), sigma=-np.eye(64))
    np.savez("lopsided.npz", mu=np.zeros(64), sigma=np.triu(np.ones((64, 64))))
    np.savez("nan.npz", mu=np.zeros(64), sigma=np.full((64, 64), np.nan))
    mean, high = np.zeros(64), np.eye(64)
    mean[7], high[3, 3] = np.nan, np.inf
    np.savez("nan_mean.npz", mu=mean, sigma=np.eye(64))
    np.savez("inf.npz", mu=np.zeros(64), sigma=high)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        np.savez("one_sample.npz", mu=np.ones(64), sigma=np.cov(np.ones((1, 64)).T))
    np.savez("huge.npz", mu=np.full(64, 1e200), sigma=np.eye(64))
    np.savez("words.npz", mu=np.full(64, "a"), sigma=np.eye(64))
    np.savez("complex.npz", mu=np.zeros(64), sigma=np.eye(64) * 1j)
    np.savez("nothing.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    Path("cut.npz").write_bytes(Path("nan.npz").read_bytes()[:500])
    with Path("array.npz").open("wb") as file:
        np.save(file, np.eye(3))
    np.savez("large.npz", arr_0=np.zeros((20, 16, 16, 1), np.uint8))
    np.savez("few.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    monkeypatch.setattr(evaluate, "draw", None)
    with pytest.raises(ValueError, match=message):
        evaluate_run(run_folder, request(tmp_path, reference=reference), tmp_path)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"feats": np.full((9, 64), np.nan)},
            r"feats in .*_kid\.npz has .* 576 of 576",
        ),
        ({"feats": np.zeros(64)}, r"has feats of shape \(64,\)"),
        ({"other": np.zeros(64)}, "holds no feats"),
        ({"feats": np.zeros((9, 3))}, "have 3 features and the mean in .* has 64"),
    ],
)
def test_broken_features_beside_clean_fids_statistics_are_refused(
    tmp_path, monkeypatch, features, message
) -> None:
    monkeypatch.setenv("OBJECTIVE_ZOO_WEIGHTS", str(tmp_path))
    np.savez(tmp_path / "toy_clean_train_8.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "toy_clean_train_8_kid.npz", **features)
    with pytest.raises(ValueError, match=message):
        find_real("cleanfid:toy_train_8", None, (1, 8, 8), 0)


def test_data_whose_reference_is_not_finite_are_named() -> None:
    dataset = SimpleNamespace(
        name="mine",
        reference=lambda num, seed: (torch.tensor([[0.0], [math.nan], [math.inf]]), None),
    )
    with pytest.raises(ValueError, match="2 of 3 reference rows of mine are not finite"):
        evaluate.reference_of(dataset, 2, 0)


def test_too_few_samples_are_refused_before_sampling(run_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "draw", None)
    with pytest.raises(ValueError, match="precision_recall need at least 4 samples, not 3"):
        evaluate_run(run_folder, request(tmp_path, num=3), tmp_path)


def test_statistics_in_single_precision_of_few_images_are_read(run_folder, tmp_path) -> None:
    """Their covariance has eigenvalues of about 1e-7 by rounding, of which the root is 3e-4."""
    pixels = np.random.default_rng(0).normal(size=(20, 64))
    sigma = np.cov(pixels.T).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64)).min() < -1e-9
    np.savez(tmp_path / "single.npz", mu=pixels.mean(0).astype(np.float32), sigma=sigma)
    how = {"num": 100, "nfe": (1,), "reference": str(tmp_path / "single.npz")}
    values = evaluate_run(run_folder, request(tmp_path, **how), tmp_path / "out")
    (features,) = blocks(tmp_path / "out").values()
    assert values["nfe1/fd_pixels"] == pytest.approx(fd(features, pixels), rel=1e-3)


def test_statistics_of_another_resize_are_warned_of(caplog) -> None:
    for theirs, ours in (("tensorflow", "clean"), ("clean", "tensorflow")):
        real = find_real_of(mean=torch.zeros(4), resize=theirs)
        extractor = type("Resizing", (Pixels,), {"resize": ours})()
        assert usable(real, extractor, 4) is real
        assert f"inception_v3.resize = '{theirs}'" in caplog.text
        caplog.clear()
        assert usable(real, Pixels(), 4) is real
        assert usable(real, type("Same", (Pixels,), {"resize": theirs})(), 4) is real
        assert not caplog.text


class Mine:
    """A metric of somebody's own, which needs the reference's mean alone and four rows."""

    better, least_rows = "lower", 4

    def against_moments(self, mean, covariance):
        def compare(samples):
            yield "mine", float((samples.mean(0) - mean).norm())

        return compare

    def against(self, reference):
        return self.against_moments(*moments(reference))

    def __call__(self, samples, reference):
        return self.against(reference)(samples)


def test_statistics_and_least_rows_are_capabilities_that_any_metric_may_have() -> None:
    real = find_real_of(mean=torch.zeros(4))
    mine = Mine()
    assert possible([mine], real, by_name=True) == [mine]
    assert least_rows([Frechet(), mine]) == 4
    assert least_rows([Frechet()]) == 2
    ((_, value),) = against(mine, real, None)(torch.ones(2, 4))
    assert value == 2.0


def find_real_of(**parts):
    from benchmarks.evaluation.reference import Real

    return Real(about="toy", covariance=torch.eye(4), **parts)


def test_a_folder_changed_in_one_byte_is_another_reference(tmp_path) -> None:
    folder, _ = grey_pictures(tmp_path / "pictures", 4)
    shape = (1, 8, 8)
    one = find_real(str(folder), None, shape, 0).about
    assert find_real(str(folder), None, shape, 0).about == one
    file = folder / "002.png"
    file.write_bytes(file.read_bytes() + b"\0")
    assert find_real(str(folder), None, shape, 0).about != one


def test_metrics_that_a_small_reference_does_not_allow_are_left_out_or_refused(caplog) -> None:
    real, rows = Real(about="three pictures", num=3), torch.randn(3, 4)
    metrics = [Frechet(), Kid(), registry.metrics.build("precision_recall")]
    assert with_enough_rows(metrics, real, rows, asked=False) == metrics[:2]
    assert "precision_recall need at least 4 real images, and three pictures has 3" in caplog.text
    with pytest.raises(ValueError, match="precision_recall need at least 4"):
        with_enough_rows(metrics, real, rows, asked=True)
    with pytest.raises(ValueError, match="frechet, kid need at least 2"):
        with_enough_rows(metrics[:2], real, rows[:1], asked=False)
