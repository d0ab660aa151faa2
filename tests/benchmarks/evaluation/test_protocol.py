"""`objective-zoo evaluate`: one set of numbers for every batch size, process count and restart."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_runs import NUM, blocks, request
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import zoo

import registry
from benchmarks.evaluation.feature_cache import FeatureSink
from benchmarks.evaluation.protocol import evaluate_run
from benchmarks.metrics import evaluate
from benchmarks.metrics.distances import Frechet, Kid
from benchmarks.metrics.features import Pixels


@pytest.fixture(scope="module")
def whole(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """An undisturbed evaluation: its values and its folder."""
    out = tmp_path_factory.mktemp("whole")
    return evaluate_run(run_folder, request(out), out), out


def test_values_are_those_of_the_features_that_are_kept(whole) -> None:
    values, out = whole
    kept = {
        json.loads((folder / "about.json").read_text())["sampler"]: torch.cat(
            [load_file(path)["features"] for path in sorted(folder.glob("block_*"))]
        )
        for folder in (out / "features").iterdir()
    }
    real = load_file(next((out / "reference").glob("*/block_000000.safetensors")))["features"]
    assert real.min() >= -1
    assert real.max() == 1
    (one,) = (features for sampler, features in kept.items() if "nfe=1" in sampler)
    assert one.shape == (NUM, 64)
    levels = 127.5 * (one + 1)  # rounded to uint8, as the real side is
    assert levels.allclose(levels.round(), atol=1e-3)
    from benchmarks.data.digits import Digits

    digits = Digits()
    pixels = (127.5 * (digits.rows(torch.arange(digits.size)) + 1)).round().flatten(1) / 127.5 - 1
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
    assert torch.equal(pixels.float() / 127.5 - 1, features)
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
