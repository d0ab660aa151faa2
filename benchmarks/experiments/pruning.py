"""Stops weak cells of a grid early, by successive halving at each periodic evaluation.

    run.pruner = @successive_halving()
    successive_halving.metric = 'nfe1/fd_efficientnetlite0'
    successive_halving.min_steps = 200
    run.evaluate_every = 200

Each cell decides for itself. When it has been evaluated, it reads what the cells beside it
recorded, and asks the pruner. It competes with the cells of its own seed alone, which see the same
data, noise and initial weights. Where one seed of an arm is pruned, the seeds of that arm that
still run are pruned too, since the mean over the others would be too good. A pruned cell keeps a
checkpoint and has no result.json. Its record ends as KILLED, with the tag `pruned`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.records.jsonl import RECORD, Record, read_record
from registry import pruners, recorders
from registry.core import did_you_mean
from registry.protocols import IntermediateValue, Pruner, Recorder, keeps_records
from trainers import ranks
from trainers.budget import Budget
from trainers.callbacks import Callback
from trainers.state import TrainState

SEED, GROUP, PRUNED = "run.seed", "group", "pruned"  # a param and two tags of a cell's record


class Pruned(Exception):
    """A cell was stopped early because it was weak."""


@pruners.register("successive_halving")
@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Lets the best 1/reduction of the cells go on at min_steps x reduction^k steps, k = 0, 1, ...

    It is the asynchronous kind (Li et al., arXiv 1810.05934), as Optuna's pruner has it: no cell
    waits for another. A cell is compared with those that reached the same step before it, and the
    best so far always goes on. Optuna's rule, and so this one, differs from the paper's in two
    ways. A weak cell is stopped for good, while the paper lets it wait and may continue it later.
    Among fewer than `reduction` cells the best goes on, while the paper lets none. Two more rules
    are ours: only cells of one seed compete, and a pruned seed ends the other seeds of its arm.
    """

    metric: str = ""
    better: str = "lower"
    min_steps: int = 0
    reduction: int = 3

    def __post_init__(self) -> None:
        if not self.metric:
            raise ValueError(
                "successive_halving.metric is not bound; bind it to a measured name, such as "
                "'nfe1/fd_pixels'"
            )
        if self.better not in ("lower", "higher"):
            raise ValueError(
                f"successive_halving.better = {self.better!r} must be 'lower' or 'higher'"
            )
        for name, least in (("min_steps", 1), ("reduction", 2)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"successive_halving.{name} = {value!r} must be {least} or more")

    def __call__(self, values: Sequence[IntermediateValue]) -> bool:
        """Replay the values to Optuna, which decides in a study that is made anew each time."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=self.min_steps, reduction_factor=self.reduction
        )
        direction: Literal["minimize", "maximize"]
        direction = "minimize" if self.better == "lower" else "maximize"
        study = optuna.create_study(pruner=pruner, direction=direction)
        trials = {cell: study.ask() for cell in dict.fromkeys(v.cell for v in values)}
        verdict = False
        for value in values:
            trials[value.cell].report(value.value, value.step)
            verdict = trials[value.cell].should_prune()
        return verdict


@dataclass(kw_only=True, eq=False)
class Pruning(Callback):
    """Asks the pruner after each evaluation; `reason` says why the run was stopped, if it was."""

    pruner: Pruner | None
    folder: Path  # of the cell
    reason: str = field(default="", init=False)

    def on_evaluate(self, state: TrainState, values: Mapping[str, float]) -> None:
        if self.pruner is None or state.progress >= 1 or not ranks.leads():
            return
        if reason := why_pruned(self.pruner, self.folder):
            self.reason = f"at step {state.step}: {reason}"
            state.stop_request = "its pruner"


def why_pruned(pruner: Pruner, folder: Path) -> str:
    """Why the cell in this folder should stop after its last evaluation; "" if it should not.

    It competes with the cells of the grid that have its seed, in the folders beside it.
    """
    own = read_record(folder)
    beside = [read_record(path.parent) for path in sorted(folder.parent.glob(f"*/{RECORD}"))]
    cells = [record for record in beside if record.parent == own.parent]
    for cell in cells:
        if cell.tags.get(PRUNED) and cell.tags.get(GROUP, cell.name) == own.tags.get(GROUP):
            return f"{cell.name}, the same with another seed, was pruned"
    values = sorted(
        value
        for cell in cells
        if cell.params.get(SEED) == own.params.get(SEED)
        for value in _values(cell, pruner.metric)
    )
    last = max(_values(own, pruner.metric), key=lambda value: value.step, default=None)
    if last is None:  # while a disk is full, lines of the record wait in memory
        return ""
    values = values[: values.index(last) + 1]
    if not pruner(values):
        return ""
    num = len({value.cell for value in values})
    return f"{pruner.metric} = {last.value:.4g} is not among the best of {num} cells"


def check_pruner(
    pruner: Pruner, recorder: Recorder, every: int, budget: Budget, measured: Sequence[str]
) -> None:
    """ValueError if the pruner could not act in a run with these settings.

    `every` is the number of steps between evaluations, `measured` the names of their values.
    """
    name = pruners.name_of(pruner)
    if not keeps_records(recorder):
        raise ValueError(
            f"run.pruner = @{name}() reads what the other cells recorded, and run.recorder = "
            f"@{recorders.name_of(recorder)}() keeps no record.jsonl. Bind run.recorder = @jsonl() "
            "or @mlflow()"
        )
    if not every:
        raise ValueError(
            f"run.pruner = @{name}() decides at the periodic evaluations, and there are none. "
            f"Bind run.evaluate_every, such as run.evaluate_every = {pruner.min_steps}"
        )
    if pruner.metric not in measured:
        raise ValueError(
            f"{name}.metric = {pruner.metric!r} is not measured in this run."
            f"{did_you_mean(pruner.metric, measured)} Measured: {', '.join(measured)}"
        )
    ours = getattr(pruner, "better", "")
    for other, ending in (("lower", "_floor"), ("higher", "_ceiling")):
        if ours not in ("", other) and f"{pruner.metric.split('/')[-1]}{ending}" in measured:
            raise ValueError(
                f"{name}.better = {ours!r}, and {other} values of {pruner.metric!r} are better: "
                f"the best cells would be pruned. Set {name}.better = {other!r}"
            )
    if budget.unit == "steps" and pruner.min_steps >= budget.amount:
        raise ValueError(
            f"{name}.min_steps = {pruner.min_steps} is not below run.steps = {budget.amount:g}, "
            "so nothing would ever be pruned; lower it, or leave run.pruner unbound"
        )


def _values(cell: Record, metric: str) -> list[IntermediateValue]:
    history = cell.metrics.get(metric)
    if history is None:
        return []
    points = zip(history.times, history.steps, history.values, strict=True)
    return [
        IntermediateValue(int(time), cell.name, int(step), float(value))
        for time, step, value in points
    ]
