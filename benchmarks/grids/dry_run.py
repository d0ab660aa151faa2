"""What a grid would do, and how long it would take, estimated from a few steps of each kind.

Training is timed on real steps of the cell (its teacher's too, where it trains one), and sampling
with its measurement once for each kind of data and metric, on a part of the samples and scaled.
Neither counts start-up, checkpoints and pictures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

from benchmarks.experiments.experiment import Experiment
from benchmarks.grids.cell_status import State
from benchmarks.grids.cells import Plan, plan
from benchmarks.grids.comparison import states_of
from benchmarks.grids.rehearsal import rehearse, remove_leftovers
from benchmarks.grids.request import Request
from benchmarks.runs.measure import measure
from benchmarks.runs.teacher import as_teacher
from registry import launchers
from registry.folders import check_output
from registry.protocols import LossOutput, is_serial
from trainers.budget import Budget
from trainers.callbacks import Callback
from trainers.loop import fit
from trainers.state import TrainState

TIMED_STEPS = 3  # after one to warm up
TIMED_SAMPLES = 200

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TimeEstimate:
    """The estimated seconds of a cell."""

    training: float
    measuring: float


@dataclass(frozen=True)
class Estimator:
    """Estimates the cost of a cell; cells of one kind are timed once."""

    known: dict[Hashable, float] = field(default_factory=dict)

    def __call__(self, experiment: Experiment) -> TimeEstimate:
        steps = _num_steps(experiment)
        if steps is None:
            training = float(experiment.budget.amount)
            steps = training / self._step(experiment)
        else:
            training = self._training(experiment, steps)
        every = experiment.evaluate_every
        return TimeEstimate(
            training, self._measure(experiment) * (1 + (steps // every if every else 0))
        )

    def _training(self, experiment: Experiment, steps: float) -> float:
        share = experiment.teacher.pretrain if experiment.teacher else 0.0
        seconds = steps * (1 - share) * self._step(experiment)
        if share and experiment.distilled is not None:
            teaching = as_teacher(experiment, experiment.distilled[1])
            seconds += steps * share * self._step(teaching)
        return seconds

    def _step(self, experiment: Experiment) -> float:
        kind = (repr(experiment.objective), *_kind(experiment), experiment.batch_size)
        if kind not in self.known:
            self.known[kind] = seconds_per_step(experiment)
        return self.known[kind]

    def _measure(self, experiment: Experiment) -> float:
        kind = (repr(experiment.metric), *_kind(experiment), experiment.nfe, experiment.num_samples)
        if kind not in self.known:
            few = replace(experiment, num_samples=min(experiment.num_samples, TIMED_SAMPLES))
            measure(few, few.net)  # the first call also loads features, which is not to be timed
            started = time.perf_counter()
            measure(few, few.net)
            scale = experiment.num_samples / few.num_samples
            self.known[kind] = scale * (time.perf_counter() - started)
        return self.known[kind]


def seconds_per_step(experiment: Experiment) -> float:
    """Seconds per training step, timed on a few steps; they change the weights of the network."""
    times = _StepTimes()
    budget = Budget(steps=1 + TIMED_STEPS)
    # To compile would take longer than the steps.
    fit(experiment.training, budget=budget, compile=False, callbacks=[times])
    return (times.seconds[-1] - times.seconds[0]) / TIMED_STEPS


@dataclass(kw_only=True, eq=False)
class _StepTimes(Callback):
    """The training seconds after each step."""

    seconds: list[float] = field(default_factory=list)

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        with state.paused():  # waits for the device
            self.seconds.append(state.seconds)


def _num_steps(experiment: Experiment) -> float | None:
    """The number of steps of the budget; None for a budget in seconds."""
    budget = experiment.budget
    if budget.unit == "seconds":
        return None
    return budget.amount / (experiment.batch_size if budget.unit == "images" else 1)


def _kind(experiment: Experiment) -> tuple[Hashable, ...]:
    return (
        experiment.backbone_name,
        experiment.num_params,
        experiment.dataset.identity(),
        repr(experiment.engine),
    )


def dry_run(
    request: Request, out: Path, workers: int | None = None, *, rehearsal: bool = True
) -> str:
    """The cells with their bindings, what they lack, and the estimate, as text.

    ValueError if the rehearsal of a cell that is to run fails.
    """
    if rehearsal:
        check_output(out, "--out", folder=True)
        remove_leftovers(out)
        planned = plan(request, request.axes())
        states = states_of(planned, out)
        left = [one for one in planned.cells if states[one.cell.name].status != "finished"]
        rehearse(left, out, planned.launcher)
    log.info("timing a few steps of each kind of cell ...")
    planned = plan(request, request.axes(), cost_of=Estimator())
    states = states_of(planned, out)
    lines = []
    for one in planned.cells:
        state = states[one.cell.name]
        lines.append(f"{one.cell.id[:8]}  {one.group}  [{_standing(state, out)}]")
        lines += [f"          {binding}" for binding in one.bindings]
    return "\n".join([*lines, *planned.notes, _estimate(planned, states, workers)])


def _standing(state: State, out: Path) -> str:
    away = state.folder.parent.resolve() != out.resolve()
    return f"{state.status} in {state.folder}" if away else state.status


def _estimate(planned: Plan, states: dict[str, State], workers: int | None) -> str:
    """Finished cells cost nothing, half-done ones as much as new ones."""
    left = [one.cost for one in planned.cells if states[one.cell.name].status != "finished"]
    training, measuring = sum(c.training for c in left), sum(c.measuring for c in left)
    where = "in one process"
    if workers is not None:
        where += f"; with {workers} workers this much divided by at best {workers}"
    elif not is_serial(planned.launcher):
        where += f"; what @{launchers.name_of(planned.launcher)}() gains is not estimated"
    return (
        f"\n{len(planned.cells)} cells, {len(left)} to run: about {_time(training + measuring)} "
        f"{where}\n(training {_time(training)} from {TIMED_STEPS} steps of each kind, sampling and "
        f"measuring {_time(measuring)}; start-up and checkpoints not counted)"
    )


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
