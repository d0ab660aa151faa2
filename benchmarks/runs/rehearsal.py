"""A rehearsal: everything that a run does, at its smallest, before anything is trained.

What fails after the training has lost the training. So a copy of the run is executed first, by the
code that will execute the run, in a folder that is removed again: its teacher, two steps with the
engine's division of the batch, the averages, a checkpoint that is read back, samples at each NFE,
the measurement, the pictures, the record and result.json. Beside that the schedule is asked for the
first and the last step, and the metric is tried on real data at the run's own number of samples.

It is bounded: about `ROWS` rows a step (the whole batch on a GPU, whose memory it must fit),
`SAMPLES` samples, no NFE above `MOST_NFE`, the metric on at most `METRIC_SAMPLES` rows, and nothing
is compiled. What fails at this size is tried once more with the run's batch and with as many
samples as the metric was tried with, since few rows may be too few where the run's own are enough.
"""

from __future__ import annotations

import logging
import math
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

import registry
from benchmarks.experiments.experiment import Experiment
from benchmarks.metrics import evaluate
from benchmarks.runs.execute import Texts, execute
from benchmarks.runs.pretraining import after_first, train_first
from benchmarks.runs.result import Result
from benchmarks.runs.training import fit_experiment
from registry import progress
from registry.configuration.gin_errors import message_of
from registry.protocols import IntermediateValue, Pruner, RunRecord, check_batch, group_of
from trainers.budget import Budget

ROWS, SAMPLES, STEPS = 16, 16, 2
MOST_NFE = 128
METRIC_SAMPLES = 1000
LATE = 1_000_000  # the last step of a budget in seconds, which has no number of steps

log = logging.getLogger(__name__)


def sizes(experiment: Experiment) -> list[tuple[int, int]]:
    """The rows and samples to rehearse with: few, then more where few were not enough."""
    few = (_few_rows(experiment), min(experiment.num_samples, SAMPLES))
    more = (experiment.batch_size, min(experiment.num_samples, METRIC_SAMPLES))
    return list(dict.fromkeys([few, more]))


def check_ends(experiment: Experiment) -> None:
    """ValueError if the schedule fails at the first or the last step, or the metric on real data.

    The metric is given as many rows as the run draws samples, and at most `METRIC_SAMPLES`.
    """
    with _no_trace(experiment.device):
        _check_schedule(experiment)
        _check_metric(experiment)


def rehearse(
    experiment: Experiment,
    again: Callable[[], Experiment],
    texts: Texts,
    record: RunRecord,
    folder: Path,
    rows: int,
    samples: int,
) -> Result:
    """Execute the run in `folder` at this size, and read back what it left there.

    It changes the weights of the experiment, which must have been built for it. What is read back
    goes into one that `again` builds, as in a run that goes on: an engine may have cut the network
    of the first into pieces.
    """
    small = _small(experiment, rows, samples)
    with _no_trace(experiment.device):
        execute(small, texts, record, folder)
        small = _small(again(), rows, samples)
        if train_first(small, record, folder, resume=True).what:
            small = after_first(small)
        fit_experiment(small, record, folder, resume=True)
        return Result.load(folder)


def cause(error: BaseException) -> str:
    """The error as one line, with the part in whose code it arose."""
    message, found = message_of(error), None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if owner is not None and (kind := registry.kind_of(owner)):
            found = f"@{kind.name_of(owner)}", kind.kind
    if found is None or found[0].removeprefix("@") in message:
        return message
    return f"in the {found[1]} {found[0]}: {message}"


def _few_rows(experiment: Experiment) -> int:
    """A divisor of the batch that the engine can cut, or the batch; on a GPU the batch."""
    batch = experiment.batch_size
    if experiment.device.type != "cpu":
        return batch
    for rows in range(ROWS, min(batch, 64 * ROWS)):
        if batch % rows == 0 and _can_cut(experiment, rows):
            return rows
    return batch


def _can_cut(experiment: Experiment, rows: int) -> bool:
    try:
        check_batch(experiment.engine, rows, group_of(experiment.objective))
    except ValueError:
        return False
    return True


def _small(experiment: Experiment, rows: int, samples: int) -> Experiment:
    return replace(
        experiment,
        budget=Budget(steps=STEPS),
        batch_size=rows,
        num_samples=samples,
        nfe=_bounded_nfe(experiment),
        log_every=1,
        evaluate_every=min(experiment.evaluate_every, 1),
        ema_snapshots=min(experiment.ema_snapshots, 1),
        checkpoint_seconds=0.0,
        compile=False,
        pruner=_consulted(experiment.pruner) if experiment.pruner else None,
    )


def _consulted(pruner: Pruner) -> Pruner:
    """A pruner that asks this one and never follows it: at two steps it knows nothing."""
    return _Consulted(metric=pruner.metric, min_steps=pruner.min_steps, pruner=pruner)


@dataclass
class _Consulted:
    metric: str
    min_steps: int
    pruner: Pruner

    def __call__(self, values: Sequence[IntermediateValue]) -> bool:
        self.pruner(values)
        return False


def _bounded_nfe(experiment: Experiment) -> tuple[int, ...]:
    """The run's NFEs up to `MOST_NFE`; where there are none, the largest that the sampler takes."""
    if few := tuple(n for n in experiment.nfe if n <= MOST_NFE):
        return few
    for nfe in range(MOST_NFE, 0, -1):
        try:
            evaluate.samplers_for(experiment.sampler, (nfe,))
        except ValueError:
            continue
        return (nfe,)
    return (min(experiment.nfe),)


def _check_schedule(experiment: Experiment) -> None:
    budget, name = experiment.budget, registry.schedules.name_of(experiment.schedule)
    images = {"steps": 1, "images": experiment.batch_size}.get(budget.unit)
    last = LATE if images is None else max(1, math.ceil(budget.amount / images))
    for step, spent in ((0, 0.0), (1, 1 / last), (last - 1, (last - 1) / last), (last, 1.0)):
        try:
            factor: Any = experiment.schedule(step, spent)  # of a user, who may give anything
        except Exception as error:
            raise ValueError(
                f"run.schedule = @{name}() fails at step {step}: {message_of(error)}"
            ) from error
        if not isinstance(factor, Real) or not 0 <= float(factor) < math.inf:
            raise ValueError(
                f"run.schedule = @{name}() gives {factor!r} at step {step}; it must give a finite "
                "number of 0 or more, which multiplies the learning rate"
            )


def _check_metric(experiment: Experiment) -> None:
    metric, dataset = experiment.metric, experiment.dataset
    num = min(experiment.num_samples, METRIC_SAMPLES)
    where = f"run.metric = {evaluate.called(metric)} on {num} rows of {dataset.name}"
    try:
        real, _ = evaluate.reference_of(dataset, num, experiment.seed)
        rows = real[torch.arange(num, 2 * num) % len(real)]
        values = dict(evaluate.values_of(metric, rows, real))
    except Exception as error:
        raise ValueError(
            f"{where} (run.num_samples = {experiment.num_samples}) fails: {cause(error)}"
        ) from error
    if undefined := [name for name, value in values.items() if math.isnan(value)]:
        raise ValueError(
            f"{where} gives nan for {', '.join(undefined)}, although both sides are real data. "
            "Look at the reference and at run.num_samples, or choose another metric"
        )


@contextmanager
def _no_trace(device: torch.device) -> Iterator[None]:
    """Leave random states as they were, show no progress, and keep notes of our own back."""
    notes = [logging.getLogger(name) for name in ("trainers", "benchmarks")]
    levels = [logger.level for logger in notes]
    words, numbers = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with progress.show_progress(False), torch.random.fork_rng(devices):
        for logger in notes:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            random.setstate(words)
            np.random.set_state(numbers)
            for logger, level in zip(notes, levels, strict=True):
                logger.setLevel(level)
