"""`objective-zoo evaluate`: one set of numbers for every batch size, process count and restart."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

import registry
from benchmarks.evaluation.feature_cache import FeatureSink
from benchmarks.evaluation.kept_evaluations import identity, joined, kept
from benchmarks.evaluation.protocol import evaluate_run
from benchmarks.evaluation.reference import Real, find_real
from benchmarks.evaluation.reference_checks import (
    least_rows,
    possible,
    usable,
    with_enough_rows,
)
from benchmarks.evaluation.request import EvaluationRequest
from benchmarks.evaluation.scores import against
from benchmarks.metrics import evaluate
from benchmarks.metrics.distances import Frechet, Kid, moments
from benchmarks.metrics.features import Pixels
from benchmarks.records.jsonl import read_record
from benchmarks.report.reading.evaluations import evaluation_lines
from benchmarks.report.reading.recorded_runs import read_runs

NUM = 600  # two blocks of 256 and a part of one


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sampler draws while it runs."""
    out = tmp_path_factory.mktemp("evaluate") / "run"
    how = (*FILE_ONLY, "mean_flow/run.sampler = @restart()")
    done = zoo("run", DIGITS, "--arm", "mean_flow", *sets(*how), "--out", out)
    assert done.status == 0, done.err
    return out / "mean_flow"


@pytest.fixture(scope="module")
def whole(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """An undisturbed evaluation: its values and its folder."""
    out = tmp_path_factory.mktemp("whole")
    return evaluate_run(run_folder, request(out), out), out


def request(out: Path, **changes) -> EvaluationRequest:
    wanted = {"num": NUM, "nfe": (1, 3), "features": ("pixels",), "cache": out / "reference"}
    return EvaluationRequest(**(wanted | changes))


def blocks(out: Path) -> dict[str, torch.Tensor]:
    """Features of all samples, block by block."""
    found = sorted((out / "features").glob("*/block_*.safetensors"))
    return {f"{p.parent.name}/{p.name}": load_file(p)["features"] for p in found}


def test_values_are_those_of_the_features_that_are_kept(whole) -> None:
    values, out = whole
    kept = {
        json.loads((folder / "about.json").read_text())["sampler"]: torch.cat(
            [load_file(path)["features"] for path in sorted(folder.glob("block_*"))]
        )
        for folder in (out / "features").iterdir()
    }
    real = load_file(next((out / "reference").glob("*/block_000000.safetensors")))["features"]
    assert real.min() >= 0  # rounded to uint8, as the samples are
    assert real.max() == 255
    (one,) = (features for sampler, features in kept.items() if "nfe=1" in sampler)
    assert one.shape == (NUM, 64)
    assert torch.equal(one, one.round())
    from benchmarks.data.digits import Digits

    digits = Digits()
    pixels = (127.5 * (digits.rows(torch.arange(digits.size)) + 1)).round().flatten(1)
    (name, expected), *_ = Frechet()(one, pixels)
    assert values[f"nfe1/{name}_pixels"] == pytest.approx(expected, rel=1e-9)
    assert set(values) >= {"nfe3/kid_pixels", "nfe3/recall_pixels", "fd_pixels_floor"}


def test_features_do_not_depend_on_the_batch_size(whole, run_folder, tmp_path) -> None:
    evaluate_run(run_folder, request(tmp_path, batch_size=100), tmp_path)
    other, one = blocks(tmp_path), blocks(whole[1])
    assert other.keys() == one.keys()
    for name, features in one.items():
        # A product over other rows may round otherwise, which moves a pixel by one step of 255.
        assert (features - other[name]).abs().max() <= 1
        assert (features != other[name]).float().mean() < 1e-3


@pytest.mark.slow
def test_two_processes_give_the_number_of_one(whole, run_folder, tmp_path) -> None:
    words = ("evaluate", run_folder, "--num", NUM, "--nfe", 1, 3, "--features", "pixels")
    command = [sys.executable, "-m", "benchmarks.cli", *map(str, words), "--ranks", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--cache", str(tmp_path / "reference")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["values"] == pytest.approx(whole[0], rel=1e-6)
    assert found["processes"] == 2
    assert done.stdout.count("| NFE 3") == 1


def test_a_killed_evaluation_continues_with_what_is_missing(
    whole, run_folder, tmp_path, monkeypatch
) -> None:
    drawn = []
    draw = evaluate.draw

    def interrupted(net, sampler, x1, cond, seed, batch_size, first):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append((sampler.nfe, first))
        return draw(net, sampler, x1, cond, seed, batch_size, first)

    monkeypatch.setattr(evaluate, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run_folder, request(tmp_path), tmp_path)
    assert drawn == [(1, 0), (1, 256), (1, 512), (3, 0)]
    torn = next(path for path in (tmp_path / "features").glob("*/block_000001.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-1])
    drawn[:] = [None]
    assert evaluate_run(run_folder, request(tmp_path), tmp_path) == whole[0]
    assert drawn[1:] == [(1, 256), (3, 256), (3, 512)]  # the torn one, and those not reached


def test_features_are_found_again_by_content(whole, run_folder, tmp_path, monkeypatch) -> None:
    values, out = whole[0], tmp_path / "copy"
    shutil.copytree(whole[1], out)

    def draw(*_args):
        raise AssertionError("nothing is to be drawn")

    monkeypatch.setattr(evaluate, "draw", draw)
    assert evaluate_run(run_folder, request(out), out) == values
    less = evaluate_run(run_folder, request(out, metrics=("frechet",), nfe=(3,)), out)
    assert less["nfe3/fd_pixels"] == values["nfe3/fd_pixels"]
    for changes in (
        {"seed": 1},
        {"nfe": (2,)},
        {"labels": "data"},
        {"num": NUM + 256},
        {"bindings": ("restart.t_min = 0.3",)},
        {"bindings": ("dit.max_frequency = 4.0",)},  # the same weights in another network
    ):
        with pytest.raises(AssertionError, match="nothing is to be drawn"):
            evaluate_run(run_folder, request(out, **changes), out)


def test_labels_are_balanced_and_those_of_the_data_on_request(
    run_folder, tmp_path, monkeypatch
) -> None:
    labels = []

    def draw(net, sampler, x1, cond, seed, batch_size, first):
        labels.extend(cond["label"].tolist())
        return torch.zeros_like(x1)

    monkeypatch.setattr(evaluate, "draw", draw)
    how = {"nfe": (1,), "metrics": ("frechet",), "num": 400}
    evaluate_run(run_folder, request(tmp_path, **how), tmp_path / "a")
    assert np.bincount(labels).tolist() == [40] * 10
    labels.clear()
    evaluate_run(run_folder, request(tmp_path, labels="data", **how), tmp_path / "b")
    assert np.bincount(labels).tolist() == [40, 41, 39, 41, 40, 40, 40, 40, 39, 40]


def test_a_number_without_equal_classes_is_warned_of(run_folder, tmp_path, caplog) -> None:
    how = {"num": 15, "nfe": (1,), "metrics": ("frechet",)}
    evaluate_run(run_folder, request(tmp_path, **how), tmp_path)
    assert "15 samples are not the same number of each of 10 classes" in caplog.text


def test_images_are_saved_on_request_and_are_what_was_measured(whole, run_folder, tmp_path) -> None:
    how = {"num": 20, "nfe": (1,), "metrics": ("frechet",), "save_images": tmp_path / "png"}
    evaluate_run(run_folder, request(tmp_path, **how), tmp_path)
    files = sorted((tmp_path / "png" / "nfe1").iterdir())
    assert [path.name for path in files[:2]] == ["000000.png", "000001.png"]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).flatten() for path in files])
    (features,) = blocks(tmp_path).values()
    assert torch.equal(pixels.float(), features)
    files[3].unlink()
    evaluate_run(run_folder, request(tmp_path, **how), tmp_path)
    assert files[3].exists()
    for changes in ({"seed": 1}, {"bindings": ("restart.t_min = 0.3",)}):
        with pytest.raises(ValueError, match="images of another evaluation"):
            evaluate_run(run_folder, request(tmp_path, **how, **changes), tmp_path)


def test_everything_that_a_value_depends_on_is_recorded(whole, run_folder) -> None:
    about = json.loads((whole[1] / "evaluation.json").read_text())
    assert about["samples"] == NUM
    assert about["labels"] == "row i has class i mod 10"
    assert "round(127.5 (x + 1))" in about["rounding"]
    assert len(about["weights"]) == 64
    assert about["code"]["version.torch"] in torch.__version__
    assert about["features"]["Pixels"]["reference"].startswith("digits: 1797")
    assert about["features"]["Pixels"]["resize"] == "none"
    assert (whole[1] / "evaluation.md").read_text().count("\n| NFE") == 2


# The real side.


def grey_pictures(folder: Path, n: int = 40) -> tuple[Path, np.ndarray]:
    rng = np.random.default_rng(0)
    folder.mkdir()
    pixels = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
    return folder, pixels


def fd(samples: torch.Tensor, real: np.ndarray) -> float:
    ((_, value),) = Frechet()(samples, torch.from_numpy(real.reshape(len(real), -1)).float())
    return value


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
    mean, covariance = moments(torch.from_numpy(pixels.reshape(40, -1)).float())
    np.savez(tmp_path / "moments.npz", mu=mean, sigma=covariance)
    for reference in (folder, tmp_path / "images.npz", tmp_path / "moments.npz"):
        how = {"num": 300, "nfe": (1,), "reference": str(reference), "metrics": ("frechet",)}
        values = evaluate_run(run_folder, request(tmp_path, **how), tmp_path / "out")
        (features,) = (torch.cat(list(blocks(tmp_path / "out").values())),)
        assert values["nfe1/fd_pixels"] == pytest.approx(fd(features, pixels), rel=1e-6)


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
    """Their covariance has negative eigenvalues of about 1e-7, from rounding."""
    pixels = np.random.default_rng(0).normal(size=(20, 64))
    sigma = np.cov(pixels.T).astype(np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64)).min() < -1e-9
    np.savez(tmp_path / "single.npz", mu=pixels.mean(0).astype(np.float32), sigma=sigma)
    how = {"num": 100, "nfe": (1,), "reference": str(tmp_path / "single.npz")}
    values = evaluate_run(run_folder, request(tmp_path, **how), tmp_path / "out")
    (features,) = blocks(tmp_path / "out").values()
    assert values["nfe1/fd_pixels"] == pytest.approx(fd(features, pixels), rel=1e-6)


class Weighted(Pixels):
    """Features that have weights of their own, as those of a trained network."""

    def provenance(self) -> dict[str, str]:
        return {**super().provenance(), "weights": "those of the features"}


@pytest.mark.parametrize("features", ["pixels", "weighted"])
def test_weights_changed_in_place_are_sampled_anew(run_folder, tmp_path, features) -> None:
    folder, how = tmp_path / "run", {"num": 20, "nfe": (1,), "metrics": ("frechet",)}
    shutil.copytree(run_folder, folder)
    with registry.extractors.temporary("weighted", Weighted):
        wanted = request(tmp_path, features=(features,), **how)
        before = evaluate_run(folder, wanted, tmp_path)
        file = folder / "model.safetensors"
        save_file({name: 2 * x for name, x in load_file(file).items()}, file)
        with pytest.raises(ValueError, match="is not the file that the run has measured"):
            evaluate_run(folder, wanted, tmp_path)
        after = evaluate_run(folder, replace(wanted, weights=file), tmp_path)
    assert after["nfe1/fd_pixels"] != before["nfe1/fd_pixels"]


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


def test_a_damaged_block_is_named_and_no_block_of_another_number_is_taken(tmp_path, caplog) -> None:
    sink = FeatureSink(cache=tmp_path, about={}, num=300, extractor=Pixels())
    sink.take(1, torch.zeros(44, 2))
    assert sink.has(1)
    assert not FeatureSink(cache=tmp_path, about={}, num=310, extractor=Pixels()).has(1)
    path = sink.folder / "block_000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    assert not sink.has(1)
    assert "its content has changed" in caplog.text
    path.write_bytes(content[:-8])
    caplog.clear()
    assert not sink.has(1)
    assert str(path) in caplog.text
    save_file({"features": torch.zeros(44, 2)}, path)  # written before there were hashes
    assert sink.has(1)


# The command line.


def test_the_command_prints_the_table_and_refuses_bindings_without_effect(
    run_folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("OBJECTIVE_ZOO_CACHE", str(tmp_path / "cache"))
    words = ("evaluate", run_folder, "--num", 20, "--nfe", 1, "--features", "pixels")
    done = zoo(*words, "--metrics", "frechet", "--out", tmp_path)
    assert done.status == 0, done.err
    assert re.search(r"\|\s+\| fd_pixels \|\n.*\n\| NFE 1 +\| +[\d.e+]+ \|", done.out)
    assert (tmp_path / "cache").is_dir()
    done = zoo(*words, "--out", tmp_path, "--set", "euler.shift = 2.0")
    assert done.status == 2
    assert "nothing uses euler.shift" in done.err
    done = zoo(*words, "--out", tmp_path, "--metrics", "feature_metrics")
    assert done.status == 2
    assert "'feature_metrics' does not compare features" in done.err


# An independent library, fed the same features.


@pytest.mark.slow
def test_distances_agree_with_torch_fidelity_on_the_same_features() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    from benchmarks.metrics.distances import Kid
    from benchmarks.metrics.precision_recall import PrecisionRecall

    rng = torch.Generator().manual_seed(0)
    basis = torch.randn(48, 48, generator=rng, dtype=torch.float64)
    real = torch.randn(400, 48, generator=rng, dtype=torch.float64) @ basis
    fake = 0.9 * torch.randn(400, 48, generator=rng, dtype=torch.float64) @ basis + 0.2
    statistics = [fid_features_to_statistics(x) for x in (fake, real)]
    theirs = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert dict(Frechet()(fake, real))["fd"] == pytest.approx(theirs, rel=1e-7)
    kid = kid_features_to_metric(
        fake, real, kid_subsets=1, kid_subset_size=400, kid_kernel="poly", verbose=False
    )
    assert dict(Kid()(fake, real))["kid"] == pytest.approx(
        kid["kernel_inception_distance_mean"], rel=1e-9
    )
    prc = prc_features_to_metric(fake, real, verbose=False)
    ours = dict(PrecisionRecall()(fake, real))
    assert ours["precision"] == pytest.approx(prc["precision"], abs=1e-6)  # theirs is float32
    assert ours["recall"] == pytest.approx(prc["recall"], abs=1e-6)


def test_evaluation_adds_to_the_files_and_to_the_record(run_folder, tmp_path) -> None:
    run, out = tmp_path / "run", tmp_path / "run" / "evaluation"
    shutil.copytree(run_folder, run)

    def evaluated(**changes) -> dict[str, float]:
        wanted = {"num": 64, "nfe": (1,), "features": ("pixels",), "metrics": ("frechet",)}
        cache = tmp_path / "reference"
        return evaluate_run(run, EvaluationRequest(**(wanted | {"cache": cache} | changes)))

    first, more = evaluated(), evaluated(nfe=(2,))
    other = evaluated(seed=1)
    newest, before = kept(out / "evaluation.json")
    assert (newest["seed"], newest["values"]) == (1, other)
    assert (before["seed"], before["values"]) == (0, first | more)
    assert set(before["sampler"]) == {"1", "2"}

    record = read_record(run)
    assert record.status == "FINISHED"
    for one, values in ((newest, other), (before, first | more)):
        told = json.loads(record.tags[f"evaluation.{identity(one)}"])
        assert (told["samples"], told["seed"]) == (64, one["seed"])
        for name, value in values.items():
            assert record.metrics[f"evaluation/{identity(one)}/{name}"].last == value
    assert out / "evaluation.json" in record.artifacts

    page = (out / "evaluation.md").read_text()
    assert page.index(f"{other['nfe1/fd_pixels']:.4g}") < page.index(
        f"{first['nfe1/fd_pixels']:.4g}"
    )
    lines = [line for cell in read_runs([run]).cells for line in evaluation_lines([cell])]
    assert [(line.name, sorted(line.by_nfe)) for line in lines] == [
        ("evaluation; seed 1", [1]),
        ("evaluation; seed 0", [1, 2]),
    ]


def test_evaluations_are_told_apart_by_how_they_were_measured() -> None:
    one = {
        "samples": 8,
        "seed": 0,
        "metrics": ["A()"],
        "sampler": {"1": "x"},
        "values": {"nfe1/a": 1},
    }
    more = one | {"metrics": ["B()"], "sampler": {"2": "x"}, "values": {"nfe2/b": 2}}
    both = joined(more, [one])
    assert both["values"] == {"nfe1/a": 1, "nfe2/b": 2}
    assert (both["metrics"], both["others"]) == (["B()", "A()"], [])
    for name, value in {"samples": 9, "seed": 1, "code": {"commit": "1"}}.items():
        apart = joined(one | {name: value}, [one])
        assert apart["others"] == [one]
        assert identity(apart) != identity(one)


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 1}', "[" * 100_000])
def test_file_that_holds_no_evaluations_is_named_before_anything_is_drawn(
    run_folder, tmp_path, text
) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be read"):
        evaluate_run(run_folder, request(tmp_path), tmp_path)


def test_metrics_that_a_small_reference_does_not_allow_are_left_out_or_refused(caplog) -> None:
    real, rows = Real(about="three pictures", num=3), torch.randn(3, 4)
    metrics = [Frechet(), Kid(), registry.metrics.build("precision_recall")]
    assert with_enough_rows(metrics, real, rows, asked=False) == metrics[:2]
    assert "precision_recall need at least 4 real images, and three pictures has 3" in caplog.text
    with pytest.raises(ValueError, match="precision_recall need at least 4"):
        with_enough_rows(metrics, real, rows, asked=True)
    with pytest.raises(ValueError, match="frechet, kid need at least 2"):
        with_enough_rows(metrics[:2], real, rows[:1], asked=False)


def test_a_metric_of_ones_own_is_imported_by_its_file(run_folder, tmp_path) -> None:
    (tmp_path / "own_evaluation_metric.py").write_text(
        "from dataclasses import dataclass\n"
        "from registry import metrics\n\n"
        '@metrics.register("own_evaluation_metric")\n'
        "@dataclass(frozen=True, kw_only=True)\n"
        "class OwnEvaluationMetric:\n"
        '    """How far the means are apart."""\n\n'
        '    better = "lower"\n\n'
        "    def against(self, reference):\n"
        "        mean = reference.mean(0)\n"
        '        return lambda x: iter([("own", float((x.mean(0) - mean).norm()))])\n\n'
        "    def __call__(self, samples, reference):\n"
        "        return self.against(reference)(samples)\n"
    )
    words = ("evaluate", run_folder, "--num", 20, "--nfe", 1, "--features", "pixels", "--out",
             tmp_path / "out", "--cache", tmp_path / "cache",
             "--metrics", "own_evaluation_metric")  # fmt: skip
    done = zoo(*words)
    assert done.status == 2
    assert "own_evaluation_metric" in done.err
    done = zoo(*words, "--import", tmp_path / "own_evaluation_metric.py")
    registry.metrics._classes.pop("own_evaluation_metric", None)
    assert done.status == 0, done.err
    assert "own_pixels" in done.out
