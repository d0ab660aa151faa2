"""Runs of other kinds: 2-D data, folders of pictures, distillation, budgets of other units."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import DIGITS, FILE_ONLY, METRIC, SIZES, entries, losses, sets, zoo

from benchmarks.grids.cell import build
from benchmarks.grids.request import Request
from benchmarks.records.jsonl import read_record
from benchmarks.runs.teacher import after_teacher, as_teacher
from registry import objectives
from registry.folders import file_sha256
from zoo.objectives.decm import DECM
from zoo.teachers import Frozen

POINTS = (*SIZES, "mlp.dim = 8", "mlp.depth = 1", "run.recorder = @jsonl()")


@pytest.fixture(scope="module")
def flow_matching(tmp_path_factory) -> Path:
    """A finished run of flow matching on digits."""
    out = tmp_path_factory.mktemp("teacher") / "out"
    done = zoo("run", DIGITS, "--arm", "flow_matching", "--out", out, *sets(*FILE_ONLY))
    assert done.status == 0, done.err
    return out / "flow_matching"


def test_record_refers_to_weights_and_checkpoints_where_they_are(flow_matching):
    tags = read_record(flow_matching).tags
    assert Path(tags["weights"]) == flow_matching / "model.safetensors"
    assert list(Path(tags["checkpoints"]).glob("step_*/manifest.json"))


def decm(out: Path, *bindings: str, resume: bool = False):
    words = ["--resume"] if resume else []
    return zoo("run", DIGITS, "--arm", "decm", "--out", out, *words, *sets(*FILE_ONLY, *bindings))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_two_dimensional_run_has_errors_against_the_exact_flow_and_a_scatter_plot(tmp_path):
    words = ["--arm", "mean_flow", "--out", tmp_path / "out", *sets(*POINTS)]
    done = zoo("run", "experiments/mixture.gin", *words)
    assert done.status == 0, done.err
    assert "error against the exact flow" in done.out
    run = tmp_path / "out" / "mean_flow"
    values = result(run)["values"]
    assert [name for name in values if "_error" in name]
    assert all(torch.tensor(list(values.values())).isfinite())
    assert (run / "samples.png").exists()
    assert zoo("sample", run, "--num", "9", "--out", tmp_path / "g.png").status == 0


def test_folder_of_pictures_is_trained_on_and_sampled(tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    for label, colour in (("red", (200, 10, 10)), ("blue", (10, 10, 200))):
        (pictures / label).mkdir(parents=True)
        for i in range(14):
            Image.new("RGB", (20 + i, 16), colour).save(pictures / label / f"{i}.png")
    file = tmp_path / "mine.gin"
    file.write_text(
        f"include '{DIGITS}'\ninclude 'data/image_folder.gin'\n"
        f"image_folder.folder = '{pictures}'\nimage_folder.resolution = 16\n"
        "Grid.arms = ('flow_matching', 'dumo')\n"
    )
    bindings = [b for b in FILE_ONLY if b not in METRIC]
    done = zoo("run", file, "--out", tmp_path / "out", *sets(*bindings, *METRIC))
    assert done.status == 0, done.err
    drawn = load_file(tmp_path / "out" / "dumo" / "samples.safetensors")["nfe1"]
    assert drawn.shape == (12, 3, 16, 16)
    assert "with dit" in done.err
    assert zoo("sample", tmp_path / "out" / "dumo", "--out", tmp_path / "g.png").status == 0

    (pictures / "red" / "3.png").write_bytes(b"no picture")
    done = zoo("run", file, "--out", tmp_path / "broken", *sets(*bindings, *METRIC))
    assert (done.status, "3.png" in done.err) == (2, True)
    assert not (tmp_path / "broken").exists()


# Distillation


def test_student_of_a_finished_run_starts_from_it_and_spends_its_whole_budget(
    flow_matching, tmp_path
):
    done = decm(tmp_path / "out", "frozen.pretrain = 0.0", f"frozen.checkpoint = '{flow_matching}'")
    assert done.status == 0, done.err
    assert "first its teacher" not in done.err
    figures = result(tmp_path / "out" / "decm")
    assert (figures["steps"], figures["teacher_steps"]) == (4, 0)
    # Four steps at a learning rate of warm-up move the weights little.
    student = load_file(tmp_path / "out" / "decm" / "model.safetensors")
    teacher = load_file(flow_matching / "model.safetensors")
    shared = [name for name in teacher if name in student]
    assert len(shared) > 10
    for name in shared:
        assert (student[name] - teacher[name]).abs().max() < 0.01, name

    moved = tmp_path / "teacher_is_gone"  # the student is sampled without its teacher
    shutil.copytree(flow_matching, moved)
    done = decm(tmp_path / "two", "frozen.pretrain = 0.0", f"frozen.checkpoint = '{moved}'")
    shutil.rmtree(moved)
    assert zoo("sample", tmp_path / "two" / "decm", "--out", tmp_path / "g.png").status == 0


def test_teacher_that_does_not_fit_is_refused_before_training(flow_matching, tmp_path):
    def refused(checkpoint: Path, *bindings: str) -> str:
        bound = ("frozen.pretrain = 0.0", f"frozen.checkpoint = '{checkpoint}'", *bindings)
        done = decm(tmp_path / "out", *bound)
        assert done.status == 2
        assert not (tmp_path / "out").exists()
        return done.err

    assert "holds no finished run" in refused(tmp_path / "nowhere")
    assert "There are runs in it: flow_matching" in refused(flow_matching.parent)
    assert "does not fit this network" in refused(flow_matching, "dit.dim = 32")
    assert "num_heads = 2 there, 4 here" in refused(flow_matching, "dit.num_heads = 4")
    assert "exclude each other" in refused(flow_matching, "frozen.pretrain = 0.5")
    only = decm(tmp_path / "out", "frozen.pretrain = 0.0")
    assert (only.status, "frozen.checkpoint" in only.err) == (2, True)


@dataclass(frozen=True, kw_only=True)
class StoppedStudent(DECM):
    """DE-CM that signals its own process at step 1, once."""

    mark: str = ""

    def loss(self, net, batch, rng):
        if batch.step == 1 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(net, batch, rng)


@pytest.mark.parametrize("when", ["teacher", "student"])
def test_distillation_is_resumed_in_either_half(tmp_path, monkeypatch, when):
    from benchmarks.runs import training

    fit = training.fit

    def stopping(trained, **given):
        """Ends the first fit of a teacher after one step, as a signal would."""
        if when == "teacher" and not (tmp_path / "mark").exists():
            (tmp_path / "mark").touch()

            class Stop(training.Callback):
                def on_step(self, state, out):
                    state.stop = "SIGTERM"

            given["callbacks"] = [Stop(), *given["callbacks"]]
        return fit(trained, **given)

    monkeypatch.setattr(training, "fit", stopping)
    student = ["decm/run.objective = @stopped()", "stopped.teacher = @frozen()"]
    student += [f"stopped.mark = '{tmp_path / 'mark'}'"]
    plain = ["decm/run.objective = @stopped()", "stopped.teacher = @frozen()"]
    plain += [f"stopped.mark = '{__file__}'"]  # exists: never stops
    with objectives.temporary("stopped", StoppedStudent):
        done = decm(tmp_path / "out", *student)
        assert done.status == 130
        assert "stopped by SIGTERM at step" in done.err
        assert decm(tmp_path / "out", *student, resume=True).status == 0
        (tmp_path / "mark").touch()
        done = decm(tmp_path / "plain", *plain)
        assert done.status == 0, done.err
    run, whole = tmp_path / "out" / "decm", tmp_path / "plain" / "decm"
    assert losses(run) == losses(whole)
    assert losses(run, "teacher/loss") == losses(whole, "teacher/loss")
    assert result(run)["values"] == result(whole)["values"]
    assert result(run)["steps"] == 4
    spent = json.loads((run / "teacher" / "spent.json").read_text())
    assert spent["weights_sha256"] == file_sha256(run / "teacher" / "model.safetensors")


@pytest.mark.parametrize(("steps", "share"), [(3, 0.5), (5, 0.3), (4, 0.9)])
def test_teacher_and_student_share_the_budget_to_the_step(steps, share):
    """What a run records of them is in the tests of the command line."""
    bindings = (*FILE_ONLY, f"run.steps = {steps}", f"frozen.pretrain = {share}")
    Request(file=Path(DIGITS), bindings=bindings, only=("decm",)).parse()
    experiment = build("decm")
    parts = as_teacher(experiment, experiment.distilled[1]), after_teacher(experiment)
    assert [part.budget.unit for part in parts] == ["steps", "steps"]
    assert sum(part.budget.amount for part in parts) == steps


def test_frozen_teachers_share_is_a_share():
    with pytest.raises(ValueError, match="frozen.pretrain"):
        Frozen(pretrain=1.0)


# Budgets


def test_budget_in_images(tmp_path):
    words = ["--arm", "shortcut", "--out", tmp_path / "out"]
    done = zoo("run", DIGITS, *words, *sets(*FILE_ONLY, "run.steps = None", "run.images = 20"))
    assert done.status == 0, done.err
    assert result(tmp_path / "out" / "shortcut")["images"] == 24  # three batches of 8
    assert "20 images at batch 8" in done.err


def test_budget_in_seconds_counts_training_alone(tmp_path):
    words = ["--arm", "flow_matching", "--out", tmp_path / "out"]
    done = zoo("run", DIGITS, *words, *sets(*FILE_ONLY, "run.steps = None", "run.seconds = 0.5"))
    assert done.status == 0, done.err
    figures = result(tmp_path / "out" / "flow_matching")
    assert 0.5 <= figures["seconds"] < 30
    assert figures["steps"] == len(losses(tmp_path / "out" / "flow_matching"))
    assert [e["status"] for e in entries(tmp_path / "out" / "flow_matching", "end")] == ["FINISHED"]


def test_a_device_that_is_not_there_is_refused_when_a_run_is_built(tmp_path):
    done = zoo("run", DIGITS, "--arm", "flow_matching", "--out", tmp_path / "out",
               *sets(*FILE_ONLY, "run.device = 'gpu'"))  # fmt: skip
    assert done.status != 0
    assert "run.device = 'gpu' is no device" in done.err
    assert "Traceback" not in done.err
