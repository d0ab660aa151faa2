"""Grids as users run them: finished, failing, stopped, started again, reproduced cell by cell."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_runs import SPACE, entries, losses, zoo

from benchmarks.records.jsonl import read_record
from benchmarks.report.reading.recorded_runs import read_runs
from registry import objectives, pruners
from zoo.objectives.flow_matching import FlowMatching

LINES = "\n".join(SPACE)
BASE = f"""
include 'experiments/mixture.gin'
{LINES}
STEPS = 4
run.batch_size = 8
run.num_samples = 12
run.nfe = (1, 2)
run.log_every = 1
run.checkpoint_seconds = 1e-9
"""
JSONL = "run.recorder = @jsonl()\n"
ONE_SEED = "Grid.repeat = {'run.seed': [1]}\n"
SEEDS = "Grid.repeat = {'run.seed': [0, 1]}\n"


@dataclass(frozen=True, kw_only=True)
class Fragile(FlowMatching):
    """Flow matching that, at step 2 of `breaks`, does what `how` says until the mark is there."""

    mark: str = ""
    how: str = ""

    def loss(self, net, batch, rng):
        if batch.step == 2 and self.how and not Path(self.mark).exists():
            if self.how == "signal":
                Path(self.mark).touch()
                os.kill(os.getpid(), signal.SIGINT)
            elif self.how == "memory":
                raise MemoryError("no room")
            elif self.how == "exit":
                sys.exit("of its own accord")
            elif self.how == "nan":
                return super().loss(_times_nan(net), batch, rng)
        return super().loss(net, batch, rng)


def _times_nan(net):
    return lambda *x: {name: float("nan") * y for name, y in net(*x).items()}


@pytest.fixture
def fragile():
    with objectives.temporary("fragile", Fragile):
        yield


@pytest.fixture
def grid(tmp_path):
    """Runs this gin text, after the small mixture, as a grid."""

    def grid(text: str, *words: str, out: str = "out", base: str = BASE + JSONL):
        file = tmp_path / "mine.gin"
        file.write_text(base + text)
        return zoo("grid", file, "--out", tmp_path / out, *words)

    return grid


def cells(out: Path) -> dict[str, Path]:
    """The folders of the cells by group and seed."""
    about = json.loads((out / "grid.json").read_text())
    found = {}
    for cell in about["cells"]:
        seed = [b.split("= ")[1] for b in cell["bindings"] if "run.seed" in b]
        found[" ".join([cell["group"], *seed])] = Path(cell["folder"])
    return found


def status(folder: Path) -> str:
    return read_record(folder).status


def test_cells_that_fail_are_recorded_and_stop_nothing_and_run_again_on_request(
    grid, fragile, tmp_path
):
    text = (
        "Grid.arms = ('plain', 'memory', 'exit', 'nan')\nplain/run.objective = @fragile()\n"
        "memory/run.objective = @fragile()\nmemory/fragile.how = 'memory'\n"
        "exit/run.objective = @fragile()\nexit/fragile.how = 'exit'\n"
        "nan/run.objective = @fragile()\nnan/fragile.how = 'nan'\n"
        f"fragile.mark = '{tmp_path / 'mark'}'\n" + ONE_SEED
    )
    done = grid(text)
    assert done.status == 1
    assert "failed: MemoryError: no room" in done.err
    assert "NonFiniteLoss" in done.err
    found = cells(tmp_path / "out")
    ends = {name: status(folder) for name, folder in found.items()}
    assert ends == dict.fromkeys(("memory 1", "exit 1", "nan 1"), "FAILED") | {
        "plain 1": "FINISHED"
    }
    assert "of its own accord" in read_record(found["exit 1"]).tags["error"]
    unfinished = {cell.group: cell.state for cell in read_runs([tmp_path / "out"]).unfinished}
    assert unfinished == dict.fromkeys(("memory", "exit", "nan"), "failed")
    assert "no room" in read_record(found["memory 1"]).tags["error"]
    assert "step 3" in read_record(found["nan 1"]).tags["error"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| plain" in table
    assert "| memory" not in table
    assert [e["status"] for e in entries(tmp_path / "out", "end")] == ["FAILED"]

    (tmp_path / "mark").touch()  # nothing would break any more
    before = (found["plain 1"] / "result.json").stat().st_mtime_ns
    done = grid(text)
    assert done.status == 1
    assert done.err.count("--retry-failed runs it again") == 3
    assert done.err.count("finished already") == 1
    done = grid(text, "--retry-failed")
    assert done.status == 0, done.err
    assert {status(folder) for folder in found.values()} == {"FINISHED"}
    assert read_record(found["nan 1"]).tags["error"] == ""
    assert (found["plain 1"] / "result.json").stat().st_mtime_ns == before
    assert losses(found["memory 1"]) == losses(found["plain 1"])  # to the bit, from step 2 on
    assert "| memory" in (tmp_path / "out" / "table.md").read_text()


def test_a_huge_grid_is_refused_at_once_and_the_limit_can_be_raised(grid, tmp_path):
    many = list(range(1, 151))
    text = f"Grid.axes = {{'run.steps': {many}}}\nGrid.repeat = {{'run.seed': {many}}}\n"
    done = grid("Grid.arms = ('flow_matching',)\n" + text, "--dry-run")
    assert done.status == 2
    assert "22,500 cells" in done.err
    assert not (tmp_path / "out").exists()
    one = "Grid.arms = ('flow_matching',)\nGrid.max_cells = 1\n" + SEEDS
    assert "2 cells" in grid(one, "--dry-run").err
    assert grid(one, "--dry-run", "--set", "Grid.max_cells = 2").status == 0


def test_sigint_stops_the_grid_and_the_same_command_goes_on(grid, fragile, tmp_path):
    text = (
        "run.objective = @fragile()\nfragile.how = 'signal'\n"
        f"fragile.mark = '{tmp_path / 'mark'}'\n" + SEEDS
    )
    done = grid(text)
    assert done.status == 130
    again = done.err.splitlines()[-1].split()
    assert again[:2] == ["objective-zoo", "grid"]
    found = cells(tmp_path / "out")
    assert status(found["fragile 0"]) == "KILLED"
    assert not (found["fragile 1"] / "record.jsonl").exists()
    assert status(tmp_path / "out") == "KILLED"

    done = zoo(*shlex.split(" ".join(again))[1:])
    assert done.status == 0, done.err
    assert grid(text, out="plain").status == 0
    for name, folder in cells(tmp_path / "plain").items():
        assert losses(found[name]) == losses(folder)
        one, two = (f / "model.safetensors" for f in (found[name], folder))
        assert one.read_bytes() == two.read_bytes()


def test_a_cell_killed_behind_its_result_is_only_closed(grid, fragile, tmp_path):
    text = "run.objective = @fragile()\n"
    grid(text)
    (folder,) = cells(tmp_path / "out").values()
    record = folder / "record.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if '"end"' not in line))
    before = (folder / "result.json").stat().st_mtime_ns
    done = grid(text)
    assert done.status == 0, done.err
    assert status(folder) == "FINISHED"
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert [step for e in entries(folder, "metrics") if "loss" in e["values"]
            for step in [e["step"]]] == [1, 2, 3, 4]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Merciless:
    """Prunes everything."""

    metric: str = "nfe1/mmd_pixels"
    min_steps: int = 1

    def __call__(self, reports):
        return True


def test_a_pruned_cell_is_left_alone_as_long_as_there_is_a_pruner(grid, tmp_path):
    text = "Grid.arms = ('flow_matching',)\nrun.evaluate_every = 2\n"
    with pruners.temporary("merciless", Merciless):
        for _ in range(2):
            done = grid(text + "run.pruner = @merciless()\n")
            assert done.status == 0, done.err
        assert "flow_matching: pruned already (at step 2" in done.err
    (folder,) = cells(tmp_path / "out").values()
    assert status(folder) == "KILLED"
    assert grid(text).status == 0
    assert status(folder) == "FINISHED"
    assert read_record(folder).tags["pruned"] == ""
    assert list(losses(folder)) == [1, 2, 3, 4]


def test_finished_cells_are_known_from_the_store_wherever_they_are(grid, tmp_path, empty_store):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = ["--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    text = "Grid.arms = ('flow_matching',)\n" + SEEDS
    assert grid(text, *uri, base=BASE).status == 0
    first = cells(tmp_path / "out")
    more = text.replace("[0, 1]", "[1, 2]")
    done = grid(more, *uri, out="two", base=BASE)
    assert done.status == 0, done.err
    assert done.err.count("finished already") == 1
    assert f"finished already in {first['flow_matching 1']} (MLflow run" in done.err
    second = cells(tmp_path / "two")
    assert second["flow_matching 1"] == first["flow_matching 1"]
    assert second["flow_matching 2"].parent == tmp_path / "two"
    rows = [line for line in done.out.splitlines() if line.startswith("| flow_matching")]
    assert rows[0].split("|")[-2].strip() == "2"  # both are in the table

    import mlflow

    client = mlflow.MlflowClient(uri[1])
    (experiment,) = (e for e in client.search_experiments() if e.name == "objective-zoo")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 2 + 3
    child = runs[second["flow_matching 2"].name].data.tags
    assert child["mlflow.parentRunId"] == runs["two"].info.run_id
    assert child["cell.id"].startswith(second["flow_matching 2"].name.split("-")[-1])
    assert {child["arm"], child["group"]} == {"flow_matching"}
    assert {"objective", "backbone", "commit", "dirty", "cell.command"} <= set(child)
    assert runs["two"].data.tags["grid"] == "mine"


def test_the_line_that_a_report_prints_reproduces_the_cell(grid, tmp_path):
    text = "Grid.arms = ('shortcut',)\nGrid.axes = {'shortcut.teacher': [@online()]}\n"
    text += ONE_SEED
    assert grid(text, "--set", "mlp.dim = 6").status == 0
    folder = cells(tmp_path / "out")["shortcut teacher=online 1"]
    words = shlex.split(read_record(folder).tags["cell.command"])
    done = zoo(*words[1:], "--out", tmp_path / "again")
    assert done.status == 0, done.err
    again = tmp_path / "again" / "shortcut"
    assert losses(again) == losses(folder)
    one, two = (f / "samples.safetensors" for f in (again, folder))
    assert one.read_bytes() == two.read_bytes()
    assert read_record(again).tags["cell.id"] == read_record(folder).tags["cell.id"]


def test_a_second_grid_in_the_same_folder_is_refused(grid, tmp_path):
    (tmp_path / "out").mkdir()
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-S", "-c", code, str(tmp_path / "out" / "grid.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = grid("Grid.arms = ('flow_matching',)\n")
        other.kill()
    assert (done.status, "another process runs a comparison" in done.err) == (2, True)
    assert not (tmp_path / "out" / "record.jsonl").exists()


def test_a_folder_of_something_else_is_not_taken(grid, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = grid("Grid.arms = ('flow_matching',)\n")
    assert (done.status, "something else than a comparison" in done.err) == (2, True)


def test_nothing_runs_if_one_cell_is_wrong(grid, tmp_path):
    done = grid("Grid.arms = ('flow_matching',)\nGrid.axes = {'mlp.depth': [1, 'deep']}\n")
    assert (done.status, "flow_matching depth=deep" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_grid_without_axes_refuses_to_go_on_with_other_settings(grid, fragile, tmp_path):
    text = "Grid.arms = ('one',)\none/run.objective = @fragile()\n"
    mark = f"fragile.mark = '{tmp_path / 'mark'}'\n"
    assert grid(text + mark + "fragile.how = 'signal'\n").status == 130
    done = grid(text + mark + "fragile.how = 'signal'\nadamw.lr = 1.0\n")
    assert (done.status, "half-done with other settings: adamw.lr" in done.err) == (2, True)
    assert grid(text + mark + "fragile.how = 'signal'\n").status == 0
    assert (tmp_path / "out" / "one" / "result.json").exists()


def test_run_of_a_file_with_axes_says_how_to_run_them(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text(BASE + JSONL + "Grid.arms = ('flow_matching',)\n" + SEEDS)
    done = zoo("run", file, "--out", tmp_path / "out")
    assert done.status == 2
    assert f"objective-zoo grid {file}" in done.err
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_the_cells_and_runs_nothing(grid, tmp_path):
    text = "Grid.arms = ('flow_matching', 'decm')\nGrid.axes = {'run.steps': [300000, None], "
    text += "'run.seconds': [None, 60.0]}\nGrid.mode = 'zip'\n"
    started = time.monotonic()
    done = grid(text, "--dry-run")
    took = time.monotonic() - started
    assert done.status == 0, done.err
    assert not (tmp_path / "out").exists()
    assert "flow_matching steps=None seconds=60.0  [new]" in done.out
    assert "decm/run.seconds = 60.0" in done.out
    assert "4 cells, 4 to run: about" in done.out
    hours, minutes, seconds = done.out.split("4 to run: about ")[1].split(" in")[0].split(":")
    estimate = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
    # 60 s in two cells, and 600,000 steps of which the slowest was timed within this call
    assert 120 <= estimate <= 120 + 600_000 * took / 3


@pytest.mark.slow
def test_arms_that_run_one_after_the_other_into_a_folder_stay_a_comparison(tmp_path):
    for arm, more in (("flow_matching", []), ("mean_flow", ["--resume"])):
        file = tmp_path / "mine.gin"
        file.write_text(BASE + JSONL + "Grid.arms = ('flow_matching', 'mean_flow')\n")
        assert zoo("run", file, "--arm", arm, "--out", tmp_path / "out", *more).status == 0
    assert read_runs([tmp_path / "out"]).groups == ("flow_matching", "mean_flow")
