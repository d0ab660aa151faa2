"""What a training step costs: every objective beside flow matching, in one interleaved run.

Each case is a run of the training loop, built from a gin file as `objective-zoo run` builds it. All
cases of a backbone and a precision are built, warmed up, and then take turns of a few steps, so
that other work of the machine slows all of them alike. A ratio is the median over turns of the time
relative to the baseline's in the same turn.

The theoretical ratio counts passes of the network (runs/passes.py); the gap is what the step takes
above it. The share outside the network is measured in a turn of its own, in which the network's
calls and the backward are timed. Peak memory is that of a fresh process per case, less what the
libraries hold before anything is built.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.experiments import defaults
from benchmarks.grids.request import Request
from benchmarks.records.provenance import provenance
from benchmarks.runs.passes import passes_per_step
from benchmarks.runs.peak_memory import PeakMemory
from benchmarks.speed.cases import Case, SteppedRun
from benchmarks.speed.overheads import Overheads, bare_loop, logging_seconds, sampling_pair
from benchmarks.speed.table import Speed, StepCost, machine, speed_table
from registry import gin_setup
from registry.protocols import Batch, Engine, LossOutput
from zoo.derivatives.dual_tensors import LinearizedRecord

STEPS_PER_TURN = 3  # DE-CM's cycle
MEMORY_STEPS = 4

log = logging.getLogger(__name__)


def run_bench(
    request: Request,
    groups: Mapping[str, Sequence[Case]],
    out: Path,
    *,
    turns: int,
    memory: bool,
) -> Speed:
    """Measure every group; the table, speed.json and the metrics of a record are kept in `out`."""
    request.parse()
    recorder = gin_setup.build("run.recorder") or defaults.recorder()
    costs: list[StepCost] = []
    overheads: list[Overheads] = []
    with recorder.start(out.name, out) as record:
        for group, cases in groups.items():
            log.info("%s: %d turns of %d steps, %d cases", group, turns, STEPS_PER_TURN, len(cases))
            measured, own = measure_group(cases, turns)
            if memory:
                log.info("%s: peak memory, a process for each case", group)
                measured = with_memory(cases, measured)
            costs += measured
            overheads.append(own)
        speed = Speed(machine=machine(), costs=costs, overheads=overheads)
        record.tags({"machine": speed.machine, **provenance()})
        record.metrics(speed.metrics(), 0)
        record.text(speed_table(speed), "speed.md")
        record.text(speed.json(), "speed.json")
    return speed


def measure_group(cases: Sequence[Case], turns: int) -> tuple[list[StepCost], Overheads]:
    """The costs of cases that share a baseline, which comes first, and the framework's own."""
    experiments = [case.build() for case in cases]
    passes = [passes_per_step(experiment).total for experiment in experiments]
    trainings = [case.training(built) for case, built in zip(cases, experiments, strict=True)]
    base, group = experiments[0], cases[0].group
    steps: list[Callable[[], object]] = [training.step for training in trainings]
    *times, bare = by_turns([*steps, bare_loop(base).__next__], turns, base.device)
    drawn, called = by_turns(sampling_pair(base), turns, base.device, each=1)
    outside = [outside_share(training) for training in trainings]
    costs = [
        StepCost(
            case=case.name,
            group=group,
            seconds=median(times[i]),
            ratio=_ratio(times[i], times[0]),
            passes=passes[i],
            theory=passes[i] / passes[0],
            images_per_second=base.batch_size / median(times[i]),
            outside=outside[i],
        )
        for i, case in enumerate(cases)
    ]
    logging = logging_seconds(base, trainings[0].state, trainings[0].step())
    return costs, Overheads(
        group=group,
        loop=_ratio(times[0], bare) - 1,
        sampling=_ratio(drawn, called) - 1,
        logging=logging / costs[0].seconds,
    )


def by_turns(
    steps: Sequence[Callable[[], object]],
    turns: int,
    device: torch.device,
    each: int = STEPS_PER_TURN,
) -> list[list[float]]:
    """Seconds per step of each of these in every turn; a first turn warms up and is left out."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(turns + 1):
        for i in range(len(steps)):
            which = (i + turn) % len(steps)  # a different one begins each turn
            seconds[which].append(_seconds(steps[which], device, each) / each)
    return [of_one[1:] for of_one in seconds]


def outside_share(training: SteppedRun) -> float:
    """The share of a turn that is spent outside the networks, their tangents and the backward."""
    state, engine = training.state, training.state.engine
    clock = _Stopwatch(state.device)
    handles = [net.register_forward_pre_hook(clock.start) for net in training.networks]
    handles += [net.register_forward_hook(clock.stop) for net in training.networks]
    state.engine = _TimedBackward(engine, clock)
    if training.experiment.compile:  # the hooks make torch compile the network anew
        _seconds(training.step, state.device)
        clock.seconds = 0.0
    with _replays_on(clock):
        whole = _seconds(training.step, state.device)
    state.engine = engine
    for handle in handles:
        handle.remove()
    return 1 - clock.seconds / whole


class _Stopwatch:
    """Adds up the seconds between start and stop; waits for what is queued on a GPU."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._since = device, 0.0, 0.0

    def start(self, *_: object) -> None:
        self._since = _now(self.device)

    def stop(self, *_: object) -> None:
        self.seconds += _now(self.device) - self._since


@contextmanager
def _replays_on(clock: _Stopwatch) -> Iterator[None]:
    """Time the derivatives that are replayed after a network's call too."""
    replay = LinearizedRecord.replay

    def timed(record: LinearizedRecord, *args: Any) -> Tensor:
        clock.start()
        tangent = replay(record, *args)
        clock.stop()
        return tangent

    with patch.object(LinearizedRecord, "replay", timed):
        yield


class _TimedBackward:
    """The engine, with its backward timed."""

    def __init__(self, engine: Engine, clock: _Stopwatch):
        self._engine, self._clock = engine, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, batch: Batch, rng: torch.Generator) -> LossOutput:
        return self._engine(batch, rng)

    def backward(self, loss: Tensor) -> None:
        self._clock.start()
        self._engine.backward(loss)
        self._clock.stop()


def with_memory(cases: Sequence[Case], costs: Sequence[StepCost]) -> list[StepCost]:
    """The costs with their peak memory, where the system tells it."""
    peaks = [peak_memory(case) for case in cases]
    base = peaks[0]
    if base is None:
        return list(costs)
    return [
        replace(cost, memory_mib=peak, memory_ratio=None if peak is None else peak / base)
        for cost, peak in zip(costs, peaks, strict=True)
    ]


def peak_memory(case: Case) -> float | None:
    """MiB of a training in a fresh process, above what the libraries hold there.

    A spawned process imports from where this one does: no folder `benchmarks` that happens to be in
    the current directory takes the place of ours.
    """
    quiet = partial(warnings.filterwarnings, "ignore", ".*torch.jit.script.*", FutureWarning)
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=quiet) as process:
        return process.submit(_peak_here, case).result()


def _peak_here(case: Case) -> float | None:
    device = _train(case, 1)  # a first step loads libraries
    before = PeakMemory(device).mib
    peak = PeakMemory(device)
    _train(case, MEMORY_STEPS)
    return None if before is None or peak.mib is None else peak.mib - before


def _train(case: Case, steps: int) -> torch.device:
    training = case.training()
    for _ in range(steps):
        training.step()
    return training.state.device


def _seconds(step: Callable[[], object], device: torch.device, num: int = STEPS_PER_TURN) -> float:
    start = _now(device)
    for _ in range(num):
        step()
    return _now(device) - start


def _ratio(times: Sequence[float], base: Sequence[float]) -> float:
    return median(mine / theirs for mine, theirs in zip(times, base, strict=True))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
