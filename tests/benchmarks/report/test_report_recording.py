"""What a run records for its report: samples on the way, nearest training pictures, its cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import DIGITS, FILE_ONLY, SIZES, sets, zoo

from benchmarks.data.digits import Digits
from benchmarks.data.pictures import to_uint8
from benchmarks.metrics.sharpness import as_sharp_as
from benchmarks.records.jsonl import read_record
from benchmarks.runs.peak_memory import PeakMemory
from benchmarks.runs.samples import _nearest


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Two arms, evaluated in the middle and at the end."""
    file = tmp_path_factory.mktemp("runs") / "two.gin"
    file.write_text(f"include '{DIGITS}'\nGrid.arms = ('mean_flow', 'decm')\n")
    out = file.parent / "out"
    done = zoo("run", file, "--out", out, *sets(*FILE_ONLY, "run.evaluate_every = 2"))
    assert done.status == 0, done.err
    return out


def test_last_kept_samples_are_the_final_ones(out):
    """Step 4 was evaluated on the way as well: same noise, labels and weights."""
    kept = load_file(out / "mean_flow" / "samples" / "step_00000004.safetensors")
    final = load_file(out / "mean_flow" / "samples.safetensors")
    assert kept.keys() == final.keys() == {"nfe1", "nfe2"}
    assert all(torch.equal(kept[name], to_uint8(final[name])[:16]) for name in kept)
    earlier = load_file(out / "mean_flow" / "samples" / "step_00000002.safetensors")
    assert not torch.equal(earlier["nfe1"], kept["nfe1"])


def test_nearest_pictures_are_training_pictures_at_the_recorded_distance(out):
    real = load_file(out / "mean_flow" / "real.safetensors")
    final = load_file(out / "mean_flow" / "samples.safetensors")["nfe1"]
    seen = torch.cat([Digits().batch(step, 8, 0)[0] for step in range(4)])  # the run's 32 images
    distance = (final[:, None] - seen[None]).flatten(2).norm(dim=2)
    # Float32 sums of 64 squares in another order.
    assert torch.allclose(real["distance_nfe1"], distance.amin(1), rtol=1e-5)
    assert torch.equal(real["nearest_nfe1"], to_uint8(seen[distance.argmin(1)]))
    assert torch.equal(real["label"], Digits().sample_labels(12)["label"])
    own = (seen[:, None] - seen[None]).flatten(2).norm(dim=2)
    own.fill_diagonal_(torch.inf)
    assert torch.allclose(real["real_distance"], own.amin(1), rtol=1e-5)
    as_sharp = as_sharp_as(seen, final)
    own = (as_sharp[:, None] - seen[None]).flatten(2).norm(dim=2)
    own.fill_diagonal_(torch.inf)
    assert torch.allclose(real["as_sharp_nfe1"], own.amin(1), rtol=1e-5)


def test_copied_training_picture_is_found_at_distance_zero():
    """Also where the search goes over several chunks."""
    digits = Digits()
    copied = digits.batch(2, 500, 0)[0][17:19]
    found, distance = _nearest(copied, digits, 1797, 0)
    assert torch.equal(found, copied)
    assert distance.tolist() == [0.0, 0.0]


def test_cost_is_recorded_as_metrics(out):
    record = read_record(out / "decm")
    result = json.loads((out / "decm" / "result.json").read_text())
    assert record.metrics["cost/seconds"].last == result["seconds"]
    assert record.metrics["cost/images"].last == result["images"] == 32
    assert record.metrics["cost/steps"].last == result["steps"] == 4
    own = (result["seconds"] - result["teacher_seconds"]) / (
        result["steps"] - result["teacher_steps"]
    )
    # The record's seconds are rounded to no digit, but their difference is taken in floats.
    assert record.metrics["cost/seconds_per_step"].last == pytest.approx(own, rel=1e-9)
    assert record.metrics["teacher/cost/seconds_per_step"].last > 0
    assert record.metrics["cost/peak_memory_mib"].last > 10


def test_each_evaluation_says_what_was_spent_by_then(out):
    record = read_record(out / "mean_flow")
    measured = record.metrics["nfe1/fd_pixels"].steps.tolist()
    for unit in ("images", "seconds"):
        assert set(measured) <= set(record.metrics[unit].steps.tolist())
    seconds = record.metrics["seconds"].values
    assert (seconds[1:] > seconds[:-1]).all()


def test_guidance_of_training_and_of_sampling_is_recorded(out, tmp_path):
    assert read_record(out / "mean_flow").tags["guidance"] == "none"
    trained = ("mean_flow.omega = 2.0", "mean_flow.kappa = 0.5")
    sampled = ("run.sampler = @cfg()", "cfg.scale = 3.0", "cfg.interval = (0.2, 0.8)")
    words = ["--arm", "mean_flow", "--out", tmp_path / "out"]
    done = zoo("run", DIGITS, *words, *sets(*FILE_ONLY, *trained, *sampled))
    assert done.status == 0, done.err
    tags = read_record(tmp_path / "out" / "mean_flow").tags
    assert tags["guidance"] == (
        "scale 4 inside (0.0, 1.0), by training; scale 3 inside (0.2, 0.8), by sampling"
    )


def test_points_keep_real_points(tmp_path):
    words = ["--arm", "mean_flow", "--out", tmp_path / "out"]
    bindings = (*SIZES, "mlp.dim = 8", "mlp.depth = 1", "run.recorder = @jsonl()")
    done = zoo("run", "experiments/mixture.gin", *words, *sets(*bindings))
    assert done.status == 0, done.err
    real = load_file(tmp_path / "out" / "mean_flow" / "real.safetensors")
    assert {name: tuple(x.shape) for name, x in real.items()} == {"real": (12, 2)}


def test_peak_memory_forgets_what_came_before_and_what_is_paused():
    """64 MiB blocks; the allocator returns blocks of that size to the system at once."""
    block = 64 * 2**20

    def touched() -> torch.Tensor:
        return torch.ones(block // 4)

    before = touched()
    del before
    peak = PeakMemory(torch.device("cpu"))
    if peak.mib is None:
        pytest.skip("this system does not tell a process its peak")
    start = peak.mib
    with peak.paused():
        touched()
    assert peak.mib - start < 16
    touched()
    assert peak.mib - start > 48
