"""Pruning: who is stopped and who is not, and what is left of a cell that was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import entries, zoo

from benchmarks.experiments.pruning import PRUNED, SuccessiveHalving, check_pruner, why_pruned
from benchmarks.records.jsonl import RECORD, read_record
from benchmarks.records.open_run import OpenRun
from benchmarks.records.recorders import Jsonl, Null
from benchmarks.runs.result import RESULT
from registry.protocols import IntermediateValue
from trainers.budget import Budget

METRIC = "nfe1/fd"


def halving(**settings: Any) -> SuccessiveHalving:
    return SuccessiveHalving(**{"metric": METRIC, "min_steps": 10, "reduction": 2, **settings})


def reports(*values: tuple[str, int, float]) -> list[IntermediateValue]:
    """In the order of time."""
    return [IntermediateValue(time, *value) for time, value in enumerate(values)]


def test_first_cell_at_a_rung_goes_on() -> None:
    assert not halving()(reports(("a", 10, 5.0)))


def test_worse_of_two_is_stopped_and_the_better_goes_on() -> None:
    assert halving()(reports(("a", 10, 5.0), ("b", 10, 6.0)))
    assert not halving()(reports(("a", 10, 5.0), ("b", 10, 4.0)))


def test_higher_may_be_better() -> None:
    assert not halving(better="higher")(reports(("a", 10, 5.0), ("b", 10, 6.0)))
    assert halving(better="higher")(reports(("a", 10, 5.0), ("b", 10, 4.0)))


def test_value_that_is_no_number_is_stopped_though_it_is_the_first() -> None:
    assert halving()(reports(("a", 10, math.nan)))


def test_nobody_is_stopped_between_the_rungs() -> None:
    better = [("a", step, 1.0) for step in (5, 10, 15, 20, 25)]
    for step, stopped in [(5, False), (10, True)]:
        assert halving()(reports(*better, ("b", step, 2.0))) is stopped
    through = [("b", 10, 0.5), ("b", 15, 3.0)]
    assert not halving()(reports(*better, *through))
    assert halving()(reports(*better, *through, ("b", 20, 3.0)))


def test_cell_whose_values_have_no_room_on_the_disk_goes_on(tmp_path: Path) -> None:
    """Its lines wait in memory, and the record on the disk has none of its values."""
    with Jsonl().start("a", tmp_path / "a") as record:
        record.params({"run.seed": 0})
        assert why_pruned(halving(), tmp_path / "a") == ""


class Rungs:
    """Asynchronous successive halving as the paper has it, for cells that report at each step."""

    def __init__(self, min_steps: int, reduction: int):
        self.min_steps, self.reduction = min_steps, reduction
        self.reached: dict[int, list[float]] = {}

    def stops(self, step: int, value: float) -> bool:
        rung = round(math.log(step / self.min_steps, self.reduction)) if step > 0 else -1
        if rung < 0 or step != self.min_steps * self.reduction**rung:
            return False
        there = self.reached.setdefault(rung, [])
        there.append(value)
        return value > sorted(there)[max(len(there) // self.reduction, 1) - 1]


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(2, 4),
    st.randoms(use_true_random=False),
)
def test_cells_that_run_at_once_are_halved_as_the_paper_says(
    values: list[list[float]], min_steps: int, reduction: int, order: Any
) -> None:
    pruner, exact = halving(min_steps=min_steps, reduction=reduction), Rungs(min_steps, reduction)
    running = dict(enumerate(values))
    done: list[IntermediateValue] = []
    while running:
        cell = order.choice(sorted(running))
        step = sum(report.cell == str(cell) for report in done) + 1
        done.append(IntermediateValue(len(done), str(cell), step, running[cell][step - 1]))
        stops = exact.stops(step, done[-1].value)
        assert pruner(done) is stops
        if stops or step == len(running[cell]):
            del running[cell]


def cell(
    parent: OpenRun, name: str, values: dict[int, float], seed: int = 0, group: str = ""
) -> Path:
    folder = parent.folder / name
    with parent.child(name, folder, tags={"group": group or name}) as record:
        record.params({"run.seed": seed})
        for step, value in values.items():
            record.metrics({METRIC: value, "loss": 0.0}, step)
    return folder


@pytest.fixture
def grid(tmp_path: Path) -> OpenRun:
    return Jsonl().start("grid", tmp_path / "grid")


def test_cell_competes_with_those_beside_it(grid: OpenRun) -> None:
    cell(grid, "a", {10: 1.0, 20: 1.0})
    weak = cell(grid, "b", {10: 2.0})
    assert why_pruned(halving(), weak) == "nfe1/fd = 2 is not among the best of 2 cells"
    assert why_pruned(halving(), cell(grid, "c", {10: 0.5})) == ""


def test_cells_of_other_seeds_and_other_grids_do_not_compete(grid: OpenRun, tmp_path: Path) -> None:
    cell(grid, "a", {10: 1.0}, seed=1)
    other = Jsonl().start("other", tmp_path / "other")
    with other.child("x", grid.folder / "x") as stray:
        stray.params({"run.seed": 0})
        stray.metrics({METRIC: 1.0}, 10)
    assert why_pruned(halving(), cell(grid, "b", {10: 2.0}, seed=0)) == ""
    assert why_pruned(halving(), cell(grid, "c", {10: 2.0}, seed=1)) != ""


def test_other_seeds_of_a_pruned_arm_are_pruned(grid: OpenRun) -> None:
    first = cell(grid, "b-0", {10: 2.0}, seed=0, group="b")
    with Jsonl().start("b-0", first) as again:
        again.tags({PRUNED: "at step 10: weak"})
        again.close("KILLED")
    follower = cell(grid, "b-1", {5: 0.1}, seed=1, group="b")
    assert why_pruned(halving(), follower) == "b-0, the same with another seed, was pruned"
    assert why_pruned(halving(), cell(grid, "c-1", {5: 0.1}, seed=1, group="c")) == ""


def test_what_others_report_later_does_not_count(grid: OpenRun) -> None:
    early = cell(grid, "a", {10: 2.0})
    cell(grid, "b", {10: 1.0})
    assert why_pruned(halving(), early) == ""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metric": ""}, r"successive_halving\.metric is not bound"),
        ({"better": "best"}, "'lower' or 'higher'"),
        ({"min_steps": 0}, r"min_steps = 0 must be 1"),
        ({"reduction": 1}, r"reduction = 1 must be 2"),
        ({"reduction": 2.5}, r"reduction = 2\.5"),
    ],
)
def test_settings_are_checked_at_construction(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        halving(**settings)


def test_pruner_that_would_prune_the_best_is_refused() -> None:
    fine = {"recorder": Jsonl(), "every": 5, "budget": Budget(steps=11)}
    low, high = ([METRIC, METRIC.split("/")[-1] + end] for end in ("_floor", "_ceiling"))
    check_pruner(halving(), **fine, measured=low)
    check_pruner(halving(better="higher"), **fine, measured=high)
    with pytest.raises(ValueError, match=r"better = 'lower', and higher values .* = 'higher'"):
        check_pruner(halving(), **fine, measured=high)
    with pytest.raises(ValueError, match=r"better = 'higher', and lower values .* = 'lower'"):
        check_pruner(halving(better="higher"), **fine, measured=low)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"every": 0}, "run.evaluate_every = 10"),
        ({"measured": ["nfe1/fd_pixels"]}, "Did you mean 'nfe1/fd_pixels'"),
        ({"budget": Budget(steps=10)}, "not below run.steps = 10"),
        ({"recorder": Null()}, "@null"),
    ],
)
def test_pruner_that_could_not_act_is_refused(changed: dict[str, Any], told: str) -> None:
    fine = {"recorder": Jsonl(), "every": 5, "budget": Budget(steps=11), "measured": [METRIC]}
    check_pruner(halving(), **fine)
    with pytest.raises(ValueError, match=told):
        check_pruner(halving(), **{**fine, **changed})


GRID = """
include 'experiments/mixture.gin'
good/run.objective = @flow_matching()
weak/run.objective = @flow_matching()
weak/adamw.lr = 1e-9
Grid.arms = ('good', 'weak')
Grid.repeat = {'run.seed': [0, 1]}
run.steps = 8
run.batch_size = 32
run.num_samples = 16
run.nfe = (1,)
run.evaluate_every = 4
run.pruner = @successive_halving()
successive_halving.metric = 'velocity_error'
successive_halving.min_steps = 4
successive_halving.reduction = 2
run.recorder = @jsonl()
"""


@pytest.mark.slow
def test_weak_arm_of_a_grid_is_pruned_and_runs_on_only_without_the_pruner(tmp_path: Path) -> None:
    (tmp_path / "grid.gin").write_text(GRID)
    words = ("grid", tmp_path / "grid.gin", "--out", tmp_path / "out")
    done = zoo(*words)
    assert done.status == 0, done.err
    cells = {folder.name.rsplit("-", 1)[0]: folder for folder in (tmp_path / "out").glob("*=*")}
    weak = [cells["weak_seed=0"], cells["weak_seed=1"]]
    for folder in weak:
        record = read_record(folder)
        assert (record.status, record.metrics["loss"].steps[-1]) == ("KILLED", 4)
        assert record.tags[PRUNED].startswith("at step 4: ")
        assert not (folder / RESULT).exists()
    assert all((cells[f"good_seed={seed}"] / RESULT).exists() for seed in (0, 1))

    lines = [(folder / RECORD).read_bytes() for folder in weak]
    assert zoo(*words).status == 0
    assert [(folder / RECORD).read_bytes() for folder in weak] == lines

    assert zoo(*words, "--set", "run.pruner = None").status == 0
    for folder in weak:
        record = read_record(folder)
        assert (record.status, record.tags[PRUNED]) == ("FINISHED", "")
        assert (folder / RESULT).exists()
        assert len(entries(folder, "resume")) == 1
        assert record.metrics["images"].steps[-1] == 8


def test_metric_that_is_not_measured_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "grid.gin").write_text(GRID.replace("'velocity_error'", "'velocity_eror'"))
    done = zoo("grid", tmp_path / "grid.gin", "--out", tmp_path / "out")
    assert done.status == 2
    assert "Did you mean 'velocity_error'" in done.err
    assert not list(tmp_path.glob("out/*/record.jsonl"))
