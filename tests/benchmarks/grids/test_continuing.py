"""A run that goes on keeps its settings; a fork is a new run from the state of another one."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import SPACE, entries, losses, sets, zoo

import objective_zoo as oz
from benchmarks.records.jsonl import RecordWriter, read_record
from benchmarks.runs.result import Result

CONSTANT = ("run.schedule = @constant_lr()", "adamw.lr = 0.01")
FILE, NAME = "experiments/mixture.gin", "flow_matching"
NFE = ("run.steps = 4", "run.batch_size = 8", "run.num_samples = 12", "run.nfe = (1,)")
BINDINGS = (*NFE, "run.log_every = 1", "run.recorder = @jsonl()", *SPACE, *CONSTANT)


def go(out: Path, *bindings: str, more: tuple[object, ...] = ()):
    words = ("run", FILE, "--arm", NAME, "--out", out, "--no-rehearsal", *more)
    return zoo(*words, *sets(*BINDINGS, *bindings))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of one run of four steps."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = go(out)
    assert done.status == 0, done.err
    return out


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "old" / "out"))


@pytest.fixture
def half_done(finished: Path) -> Path:
    """The same, killed after its last checkpoint."""
    (finished / NAME / "result.json").unlink()
    return finished


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("adamw.lr = 0.05", "adamw.lr = 0.01, now 0.05"),
        ("run.steps = 6", "run.steps = 4, now 6"),
        ("run.seed = 3", "run.seed = "),
        ("run.batch_size = 4", "run.batch_size = 8, now 4"),
        ("run.ema_decay = 0.5", "run.ema_decay"),
    ],
)
def test_half_done_run_refuses_what_its_numbers_depend_on(
    change: str, told: str, half_done: Path
) -> None:
    before = (half_done / NAME / "record.jsonl").read_bytes()
    done = go(half_done, change, more=("--resume",))
    assert done.status == 2
    assert "half-done with other settings" in done.err
    assert told in done.err
    assert f"--fork {half_done / NAME}" in done.err
    assert (half_done / NAME / "record.jsonl").read_bytes() == before


def test_half_done_run_refuses_other_data_of_the_same_settings(half_done: Path) -> None:
    """As when the pictures in a folder are others than those that the run began with."""
    cell = json.loads((half_done / NAME / "cell.json").read_text())
    (half_done / NAME / "cell.json").write_text(json.dumps(cell | {"id": "made of other data"}))
    writer = RecordWriter(half_done / NAME)
    writer.append("tags", values={"data": "what was there"})
    writer.close()
    done = go(half_done, more=("--resume",))
    assert (done.status, "data = what was there, now " in done.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["run.log_every = 2", "run.checkpoint_seconds = 1.0", "run.evaluate_every = 2"]
)
def test_half_done_run_goes_on_with_what_touches_no_number(
    change: str, half_done: Path, made: Path
) -> None:
    done = go(half_done, change, more=("--resume",))
    assert done.status == 0, done.err
    assert Result.load(half_done / NAME).values == Result.load(made / NAME).values


def test_finished_run_with_more_steps_is_refused_and_forked(finished: Path, tmp_path: Path) -> None:
    done = go(finished, "run.steps = 6", more=("--resume",))
    assert (done.status, "finished with other settings" in done.err) == (2, True)
    assert f"--fork {finished / NAME}" in done.err

    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    fork, whole = tmp_path / "fork", tmp_path / "whole"
    done = go(fork, "run.steps = 6", more=("--fork", finished))
    assert done.status == 0, done.err
    assert {p: p.read_bytes() for p in before} == before  # the parent stays as it is
    assert go(whole, "run.steps = 6").status == 0
    # With a constant learning rate nothing depends on the budget: bit for bit.
    assert losses(fork / NAME) == {k: v for k, v in losses(whole / NAME).items() if k > 4}
    assert Result.load(fork / NAME).values == Result.load(whole / NAME).values

    record, parent = read_record(fork / NAME), read_record(finished / NAME)
    assert record.id != parent.id
    assert record.tags["fork.parent"] == parent.id
    assert record.tags["fork.step"] == "4"
    assert json.loads(record.tags["fork.differences"]) == {"run.steps": "4, now 6"}
    assert record.tags["cell.id"] != read_record(whole / NAME).tags["cell.id"]
    assert record.tags["cell.command"].endswith(f"--fork {finished.resolve() / NAME}")
    assert (fork / NAME / "config.gin").read_text().startswith("# Forked from ")

    again = go(fork, "run.steps = 6", more=("--fork", finished, "--resume"))
    assert (again.status, "finished already" in again.err) == (0, True)
    assert not entries(fork / NAME, "resume")


def test_fork_with_another_learning_rate_starts_from_the_state(
    half_done: Path, tmp_path: Path
) -> None:
    fork = tmp_path / "fork"
    one_run = half_done / NAME  # the run itself may be named, too
    pairs = (binding.split(" = ") for binding in BINDINGS)
    bound = {k: v if v.startswith("@") else ast.literal_eval(v) for k, v in pairs}
    found = oz.run(
        FILE, arms=[NAME], out=fork, fork=one_run, rehearsal=False,
        set=bound | {"adamw.lr": 0.05, "run.steps": 5},
    )  # fmt: skip
    assert list(losses(fork / NAME)) == [5]
    tags = read_record(found.runs[NAME].folder).tags
    changed = {"adamw.lr": "0.01, now 0.05", "run.steps": "4, now 5"}
    assert json.loads(tags["fork.differences"]) == changed


def test_fork_needs_a_state_and_another_folder(finished: Path, tmp_path: Path) -> None:
    done = go(tmp_path / "new", more=("--fork", tmp_path / "nowhere"))
    assert (done.status, "has no checkpoint to start from" in done.err) == (2, True)
    assert not (tmp_path / "new" / NAME).exists()
    done = go(finished, more=("--fork", finished, "--resume"))
    assert (done.status, "choose another --out" in done.err) == (2, True)
