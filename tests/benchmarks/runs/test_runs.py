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
from benchmarks.runs.pretraining import after_first, first_of
from registry import objectives
from registry.folders import file_sha256
from zoo.objectives.decm import DECM
from zoo.objectives.mean_flow import MeanFlow
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
class StopsOnce:
    """An objective that signals its own process at step 1, once."""

    mark: str = ""

    def loss(self, net, batch, rng):
        if batch.step == 1 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(net, batch, rng)


@dataclass(frozen=True, kw_only=True)
class StoppedStudent(StopsOnce, DECM):
    """DE-CM that is stopped once."""


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
    parts = first_of(experiment, experiment.distilled[1]), after_first(experiment)
    assert [part.budget.unit for part in parts] == ["steps", "steps"]
    assert sum(part.budget.amount for part in parts) == steps


def test_frozen_teachers_share_is_a_share():
    with pytest.raises(ValueError, match="frozen.pretrain"):
        Frozen(pretrain=1.0)


# A network that is trained by flow matching first


def pretrained(out: Path, *bindings: str, arm: str = "mean_flow", resume: bool = False):
    words = ["--arm", arm, "--out", out, *(["--resume"] if resume else [])]
    return zoo("run", DIGITS, *words, *sets(*FILE_ONLY, "run.pretrain = 0.5", *bindings))


def test_network_starts_from_flow_matching_in_one_recorded_budget(tmp_path):
    # At no learning rate the averages of both phases are what they started from.
    done = pretrained(tmp_path / "out", "run.steps = 5", "mean_flow/adamw.lr = 1e-12")
    assert done.status == 0, done.err
    assert "first flow matching with 50% of the budget" in done.err
    assert "(2 pretrain)" in done.out
    run = tmp_path / "out" / "mean_flow"
    figures = result(run)
    assert (figures["steps"], figures["pretrain_steps"], figures["teacher_steps"]) == (5, 2, 0)
    assert figures["images"] == 40
    assert 0 < figures["pretrain_seconds"] < figures["seconds"]
    first, own = losses(run, "pretrain/loss"), losses(run)
    assert (len(first), len(own)) == (2, 3)
    recorded = {name for e in entries(run, "metrics") for name in e["values"]}
    for name in ("cost/passes_per_step", "cost/seconds_per_step"):
        assert {name, f"pretrain/{name}"} <= recorded
    passes = [e["values"].get("pretrain/cost/passes_per_step") for e in entries(run, "metrics")]
    assert 3.0 in passes
    start, end = (load_file(f / "model.safetensors") for f in (run / "pretrain", run))
    shared = [name for name in start if name in end]
    assert len(shared) > 10
    for name in shared:
        torch.testing.assert_close(end[name], start[name], atol=1e-6, rtol=1e-6)
    # u starts as v, so the first loss is what flow matching has come to, not that of a new start.
    assert "trunk.second_time" not in " ".join(start)


@dataclass(frozen=True, kw_only=True)
class StoppedMeanFlow(StopsOnce, MeanFlow):
    """MeanFlow that is stopped once."""


@pytest.mark.parametrize("when", ["pretrain", "objective"])
def test_a_run_with_two_phases_is_resumed_in_either_bit_by_bit(tmp_path, monkeypatch, when):
    from benchmarks.runs import training

    fit, mark = training.fit, tmp_path / "mark"

    class Stop(training.Callback):
        def on_step(self, state, out):
            state.stop = "SIGTERM"

    def stopping(trained, **given):
        """Ends the first fit after one step, as a signal would."""
        if when == "pretrain" and not mark.exists():
            mark.touch()
            given["callbacks"] = [Stop(), *given["callbacks"]]
        return fit(trained, **given)

    monkeypatch.setattr(training, "fit", stopping)
    bound = ["mean_flow/run.objective = @stopped_mean_flow()"]
    with objectives.temporary("stopped_mean_flow", StoppedMeanFlow):
        given = [*bound, f"stopped_mean_flow.mark = '{mark}'"]
        done = pretrained(tmp_path / "out", *given)
        assert done.status == 130, done.err
        assert pretrained(tmp_path / "out", *given, resume=True).status == 0
        done = pretrained(tmp_path / "plain", *bound, f"stopped_mean_flow.mark = '{__file__}'")
        assert done.status == 0, done.err
    run, whole = tmp_path / "out" / "mean_flow", tmp_path / "plain" / "mean_flow"
    for name in ("loss", "pretrain/loss"):
        assert losses(run, name) == losses(whole, name)
    assert result(run)["values"] == result(whole)["values"]
    assert (result(run)["steps"], result(run)["pretrain_steps"]) == (4, 2)


@pytest.mark.parametrize(
    ("arm", "bindings", "says"),
    [
        ("mean_flow", ("run.pretrain = 1.0",), "run.pretrain = 1.0 must be below 1"),
        ("flow_matching", (), "which run.objective = @flow_matching() is"),
        ("decm", (), "frozen.pretrain is the share of the budget for the teacher"),
        ("mean_flow", ("run.start_from = 'x'",), "run.start_from = 'x' says otherwise"),
        ("mean_flow", ("run.warm_start = False",), "run.warm_start = False says otherwise"),
        ("mean_flow", ("run.pretrain = 0.0", "run.warm_start = False"), "this run has none"),
    ],
)
def test_starts_that_contradict_each_other_are_refused(tmp_path, arm, bindings, says):
    done = pretrained(tmp_path / "out", *bindings, arm=arm)
    assert (done.status, says in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


# Teachers of another width


def test_exported_teacher_of_another_width_teaches_without_a_warm_start(flow_matching, tmp_path):
    assert zoo("export", flow_matching, "--out", tmp_path / "teacher").status == 0
    bound = [
        "frozen.pretrain = 0.0",
        f"frozen.checkpoint = '{tmp_path / 'teacher'}'",
        "dit.dim = 24",
    ]
    done = decm(tmp_path / "refused", *bound)
    assert done.status == 2
    assert "bind run.warm_start = False" in done.err
    assert not (tmp_path / "refused").exists()
    done = decm(tmp_path / "out", *bound, "run.warm_start = False")
    assert done.status == 0, done.err
    figures = result(tmp_path / "out" / "decm")
    assert (figures["steps"], figures["teacher_steps"]) == (4, 0)
    # The folder of the run itself is read for a network like the student's.
    run = ["frozen.pretrain = 0.0", f"frozen.checkpoint = '{flow_matching}'", "dit.dim = 24"]
    done = decm(tmp_path / "run", *run, "run.warm_start = False")
    assert (done.status, "objective-zoo export" in done.err) == (2, True), done.err


def test_student_without_a_warm_start_starts_as_new(flow_matching, tmp_path):
    """At no learning rate its weights are not the teacher's."""
    bound = ["frozen.pretrain = 0.0", f"frozen.checkpoint = '{flow_matching}'"]
    bound += ["decm/adamw.lr = 1e-12", "run.warm_start = False", "run.seed = 5"]
    done = decm(tmp_path / "out", *bound)
    assert done.status == 0, done.err
    student = load_file(tmp_path / "out" / "decm" / "model.safetensors")
    teacher = load_file(flow_matching / "model.safetensors")
    name = next(n for n in teacher if n.endswith("attn.qkv.weight"))
    assert (student[name] - teacher[name]).abs().max() > 1e-4


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
