"""The command line as users have it: comparisons, records, resuming, samples."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ARMS, DIGITS, FILE_ONLY, TINY, entries, losses, sets, zoo

from benchmarks.records.recorders import Jsonl
from registry import objectives
from zoo.objectives.flow_matching import FlowMatching

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Interrupted(FlowMatching):
    """Flow matching that signals its own process at step 2, once."""

    mark: str = ""
    signal: int = 0

    def loss(self, net, batch, rng):
        if batch.step == 2 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), self.signal)
        return super().loss(net, batch, rng)


@dataclass(frozen=True, kw_only=True)
class Failing(FlowMatching):
    """Flow matching that breaks at step 2."""

    def loss(self, net, batch, rng):
        if batch.step == 2:
            raise RuntimeError("it broke")
        return super().loss(net, batch, rng)


@pytest.fixture(scope="session")
def store(tmp_path_factory, empty_store) -> Path:
    return shutil.copy(empty_store, tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, store):
    """A finished comparison of the five: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    uri = ["--tracking-uri", f"sqlite:///{store}"]
    done = zoo("run", DIGITS, "--out", folder, *uri, *sets(*TINY))
    assert done.status == 0, done.err
    return folder, done


@pytest.fixture(scope="session")
def folder(finished) -> Path:
    return finished[0]


def test_comparison_prints_a_table_of_every_arm(finished):
    folder, done = finished
    assert (folder / "table.md").read_text() in done.out
    rows = [line.split("|")[1].strip() for line in done.out.splitlines() if line.startswith("| ")]
    assert rows[:6] == ["arm", *ARMS]
    assert "NFE 2" in done.out
    assert "mlflow ui --backend-store-uri" in done.out
    assert str(folder / "samples.png") in done.out


def test_comparison_says_that_a_teacher_is_trained_first_and_counts_its_steps(finished):
    folder, done = finished
    assert "first its teacher: flow matching with 50% of the budget" in done.err
    result = json.loads((folder / "decm" / "result.json").read_text())
    assert (result["steps"], result["teacher_steps"], result["images"]) == (4, 2, 32)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_leaves_its_figures_samples_and_texts(folder, arm):
    result = json.loads((folder / arm / "result.json").read_text())
    assert {"nfe1/fd_pixels", "nfe2/fd_pixels", "fd_pixels_floor"} <= set(result["values"])
    assert all(value == value for value in result["values"].values())
    samples = load_file(folder / arm / "samples.safetensors")
    assert {name: tuple(x.shape) for name, x in samples.items()} == {
        "nfe1": (12, 1, 8, 8),
        "nfe2": (12, 1, 8, 8),
    }
    for name in ("samples.png", "model.safetensors", "config.gin", "operative.gin"):
        assert (folder / arm / name).stat().st_size > 0, name
    assert f"{arm}/run.objective = @{arm}()" in (folder / arm / "config.gin").read_text()
    assert objectives.get(arm).__name__ in (folder / arm / "objective.txt").read_text()


def test_samples_of_all_arms_start_from_the_same_noise(folder):
    """At 1 NFE the almost untrained networks give back the noise, up to what 4 steps changed."""
    first = [load_file(folder / arm / "samples.safetensors")["nfe1"] for arm in ARMS]
    for other in first[1:]:
        assert (other - first[0]).abs().mean() < 0.1 * first[0].abs().mean()


def test_record_has_every_step_the_tags_and_the_settings(folder):
    run = folder / "mean_flow"
    assert list(losses(run)) == [1, 2, 3, 4]
    tags = {k: v for e in entries(run, "tags") for k, v in e["values"].items()}
    assert (tags["arm"], tags["backbone"], tags["sampler"]) == ("mean_flow", "dit", "flow_map")
    assert {"commit", "version.torch", "data", "measured.reference"} <= set(tags)
    params = {k: v for e in entries(run, "params") for k, v in e["values"].items()}
    assert params["run.objective"] == "@mean_flow()"
    assert params["run.steps"] == "4"
    assert params["adaptive.power"] == "1.0"
    assert [e["status"] for e in entries(run, "end")] == ["FINISHED"]


def test_mlflow_store_has_a_parent_and_a_child_per_arm(folder, store):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store}")
    (chosen,) = (e for e in client.search_experiments() if e.name == "objective-zoo")
    runs = {run.info.run_name: run for run in client.search_runs([chosen.experiment_id])}
    assert set(runs) == {*ARMS, folder.name}
    parent = runs[folder.name]
    for arm in ARMS:
        run = runs[arm]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["run.objective"] == f"@{arm}()"
        assert "nfe1/fd_pixels" in run.data.metrics
        assert {f.path for f in client.list_artifacts(run.info.run_id)} >= {
            "config.gin", "operative.gin", "objective.txt", "samples.png", "result.json",
        }  # fmt: skip
    history = client.get_metric_history(runs["dumo"].info.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4]
    artifacts = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert artifacts >= {"table.md", "samples.png", "config.gin"}


def test_kept_gin_text_runs_the_same_again(folder, tmp_path):
    done = zoo("run", folder / "mean_flow" / "config.gin", "--out", tmp_path / "again")
    assert done.status == 0, done.err
    assert losses(tmp_path / "again" / "mean_flow") == losses(folder / "mean_flow")  # to the bit
    one, two = (f / "mean_flow" / "samples.safetensors" for f in (folder, tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


def test_kept_gin_text_of_the_comparison_asks_for_every_arm(folder):
    text = (folder / "config.gin").read_text()
    assert text.startswith(f"# Made by: objective-zoo run {DIGITS} --set 'run.steps = 4'")
    from benchmarks.grids.request import Request

    request = Request(file=folder / "config.gin")
    assert request.arms() == ARMS
    assert request.own_keys(ARMS) == set()


def test_arms_start_from_the_same_shared_weights():
    from benchmarks.grids.cell import build
    from benchmarks.grids.request import Request

    request = Request(file=Path(DIGITS), bindings=FILE_ONLY)
    experiments = {}
    for arm in ARMS:
        request.parse()
        experiments[arm] = build(arm)
    nets = {arm: experiment.net.trunk.state_dict() for arm, experiment in experiments.items()}
    for name, weights in nets.items():
        shared = weights.keys() & nets["flow_matching"].keys()
        assert shared == nets["flow_matching"].keys()
        for key in shared:
            assert torch.equal(weights[key], nets["flow_matching"][key]), (name, key)
    about = {(e.seed, e.batch_size, e.budget, e.dataset) for e in experiments.values()}
    assert len(about) == 1


# Resuming


def test_finished_arms_are_not_run_again(folder):
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*/result.json")}
    done = zoo("run", folder / "config.gin", "--out", folder, "--resume")
    assert done.status == 0, done.err
    assert done.err.count("finished already") == len(ARMS)
    assert {f: f.stat().st_mtime_ns for f in folder.glob("*/result.json")} == before


def test_finished_arms_are_not_put_beside_others_of_other_settings(folder):
    done = zoo("run", folder / "config.gin", "--out", folder, "--resume", *sets("run.steps = 9"))
    assert done.status == 2
    assert "finished with other settings: run.steps = 4, now 9" in done.err


def test_a_folder_in_use_is_not_run_into(folder):
    done = zoo("run", DIGITS, "--out", folder, *sets(*TINY))
    assert done.status == 2
    assert "--resume" in done.err


def interrupted(number: int, mark: Path) -> list[str]:
    bindings = (*FILE_ONLY, "run.objective = @interrupted()", f"interrupted.mark = '{mark}'")
    return sets(*bindings, f"interrupted.signal = {number}", "run.checkpoint_seconds = 1e-9")


def test_a_run_ended_by_sigterm_goes_on_where_it_was(folder, tmp_path):
    with objectives.temporary("interrupted", Interrupted):
        words = ["run", DIGITS, "--out", tmp_path / "out"]
        words += interrupted(signal.SIGTERM, tmp_path / "mark")
        done = zoo(*words)
        assert done.status == 130
        assert "stopped by SIGTERM at step 3" in done.err
        assert "--resume" in done.err.splitlines()[-1]
        run = tmp_path / "out" / "interrupted"
        assert [e["status"] for e in entries(run, "end")] == ["KILLED"]
        assert not (run / "result.json").exists()
        assert zoo("sample", run).status == 2  # unfinished

        done = zoo(*words, "--resume")
        assert done.status == 0, done.err
    assert losses(run) == losses(folder / "flow_matching")
    assert [e["status"] for e in entries(run, "end")] == ["KILLED", "FINISHED"]


PLUGIN = """
import os, signal
from dataclasses import dataclass
from pathlib import Path
from registry import objectives
from zoo.objectives.flow_matching import FlowMatching

@objectives.register("killed")
@dataclass(frozen=True, kw_only=True)
class Killed(FlowMatching):
    \"\"\"Flow matching that kills its process at step 2, once.\"\"\"
    mark: str = ""

    def loss(self, net, batch, rng):
        if batch.step == 2 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(net, batch, rng)
"""


@pytest.mark.slow  # a whole process
def test_a_comparison_ended_by_sigkill_goes_on_where_it_was(folder, tmp_path):
    """The first arm is finished, the second is killed, the third has not begun."""
    (tmp_path / "killed_plugin.py").write_text(PLUGIN)
    file = tmp_path / "mine.gin"
    file.write_text(
        f"include '{DIGITS}'\nimport killed_plugin\nkilled/run.objective = @killed()\n"
        f"killed.mark = '{tmp_path / 'mark'}'\n"
        "Grid.arms = ('flow_matching', 'killed', 'shortcut')\n"
    )
    words = ["run", str(file), "--out", str(tmp_path / "out")]
    words += sets(*FILE_ONLY, "run.checkpoint_seconds = 1e-9")
    command = [sys.executable, "-m", "benchmarks.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out" / "flow_matching" / "result.json").exists()
    assert not (tmp_path / "out" / "shortcut" / "record.jsonl").exists()

    done = zoo(*words, "--resume")
    assert done.status == 0, done.err
    assert done.err.count("finished already") == 1
    assert losses(tmp_path / "out" / "killed") == losses(folder / "flow_matching")
    assert losses(tmp_path / "out" / "shortcut") == losses(folder / "shortcut")
    assert zoo("sample", tmp_path / "out" / "killed", "--out", tmp_path / "g.png").status == 0


def test_a_failing_arm_does_not_stop_the_others(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text(
        f"include '{DIGITS}'\nGrid.arms = ('failing', 'flow_matching')\n"
        "failing/run.objective = @failing()\n"
    )
    with objectives.temporary("failing", Failing):
        done = zoo("run", file, "--out", tmp_path / "out", *sets(*FILE_ONLY))
    assert done.status == 1
    assert "failing failed: RuntimeError: it broke" in done.err
    assert [e["status"] for e in entries(tmp_path / "out" / "failing", "end")] == ["FAILED"]
    assert [e["status"] for e in entries(tmp_path / "out", "end")] == ["FAILED"]
    assert (tmp_path / "out" / "flow_matching" / "result.json").exists()
    assert "| flow_matching" in done.out


# Samples, sending


def test_sample_draws_a_grid_from_a_finished_run(folder, tmp_path):
    from PIL import Image

    picture = tmp_path / "deep" / "grid.png"
    run = folder / "mean_flow"
    done = zoo("sample", run, "--nfe", "1", "2", "4", "--num", "8", "--out", picture)
    assert done.status == 0, done.err
    assert str(picture) in done.out
    assert min(Image.open(picture).size) > 8


def test_sample_takes_another_sampler(folder, tmp_path):
    run = folder / "dumo"
    words = ["sample", run, "--num", "2", "--nfe", "2", "--out", tmp_path / "g.png", "--sampler"]
    assert zoo(*words, "heun").status == 0
    done = zoo(*words, "huen")
    assert (done.status, "Did you mean 'heun'?" in done.err) == (2, True)
    words[1] = folder / "flow_matching"
    done = zoo(*words, "mix")
    assert (done.status, "cannot use sampler 'mix'" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([""], "There are runs in it: decm, dumo"),
        (["nowhere"], "holds no finished run"),
        (["mean_flow", "--nfe", "0"], "positive integer"),
        (["mean_flow", "--num", "0"], "number of samples"),
    ],
)
def test_sample_refuses_what_it_cannot_draw(folder, tmp_path, words, says):
    done = zoo("sample", folder / words[0], "--out", tmp_path / "g.png", *words[1:])
    assert done.status == 2
    assert says in done.err
    assert not (tmp_path / "g.png").exists()


def test_send_copies_a_record_to_a_store(tmp_path, empty_store):
    out = tmp_path / "out"
    with Jsonl().start("out", out) as run, run.child("mean_flow", out / "mean_flow") as child:
        child.metrics({"loss": 1.0}, 1)
    done = zoo("send", out)
    assert (done.status, "give a tracking uri" in done.err) == (2, True)
    shutil.copy(empty_store, tmp_path / "late.db")
    done = zoo("send", out, "--tracking-uri", f"sqlite:///{tmp_path / 'late.db'}")
    assert done.status == 0, done.err
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'late.db'}")
    (chosen,) = (e for e in client.search_experiments() if e.name == "objective-zoo")
    names = {run.info.run_name for run in client.search_runs([chosen.experiment_id])}
    assert names == {"out", "mean_flow"}
