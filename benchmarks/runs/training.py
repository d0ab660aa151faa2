"""Trains one experiment, with its records, averages, checkpoints and evaluations."""

from __future__ import annotations

import logging
from pathlib import Path

from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.pruning import PRUNED, Pruned, Pruning
from benchmarks.records.jsonl import RECORD
from benchmarks.runs.measure import measure
from benchmarks.runs.peak_memory import PeakMemory
from benchmarks.runs.samples import keep_samples
from registry.protocols import RunRecord
from trainers.callbacks import (
    Callback,
    CheckpointCallback,
    MetricsLog,
    PeriodicEvaluation,
    ProgressBar,
    StopOnNonFinite,
)
from trainers.ema.snapshots import EmaSnapshots
from trainers.loop import fit
from trainers.state import TrainState

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; its checkpoint continues it."""


def fit_experiment(
    experiment: Experiment,
    record: RunRecord,
    folder: Path,
    resume: bool,
    *,
    prefix: str = "",
) -> TrainState:
    """Train what `experiment` says; raises Stopped if a signal ended it, Pruned if its pruner did.

    `prefix` begins the names of what is recorded. A run's own training has none.
    """
    peak = PeakMemory(experiment.device)

    def keep(values: dict[str, float], step: int) -> None:
        record.metrics({prefix + name: value for name, value in values.items()}, step)

    def evaluation(state: TrainState) -> dict[str, float]:
        with peak.paused():
            try:
                keep_samples(experiment, state.ema_net, folder / "samples", state.step)
            except OSError as problem:
                log.warning("NO SAMPLES kept of step %d: %s", state.step, problem)
            values = dict(measure(experiment, state.ema_net))
        return values | {"images": float(state.images), "seconds": state.seconds}

    callbacks: list[Callback] = [
        StopOnNonFinite(policy=experiment.non_finite),
        MetricsLog(record=keep, every=experiment.log_every),
        ProgressBar(label=f"  {record.name}{f' ({prefix[:-1]})' if prefix else ''}"),
    ]
    if every := experiment.evaluate_every:
        callbacks.append(PeriodicEvaluation(fn=evaluation, every=every, at_end=False))
    if sigma_rels := experiment.power_emas:
        callbacks.append(EmaSnapshots(sigma_rels=sigma_rels, count=experiment.ema_snapshots))
    pruning = Pruning(pruner=experiment.pruner, folder=folder)
    callbacks.append(pruning)
    records = (folder / RECORD, folder.parent / RECORD)  # its own, or that of the run it begins
    callbacks.append(CheckpointCallback(every_seconds=experiment.checkpoint_seconds, along=records))
    state = fit(experiment.training, callbacks=callbacks, folder=folder, resume=resume)
    if pruning.reason:
        record.tags({PRUNED: pruning.reason})
        record.close("KILLED")
        raise Pruned(pruning.reason)
    if state.stop:
        raise Stopped(f"stopped by {state.stop} at step {state.step}")
    cost = {"cost/seconds_per_step": state.seconds / state.step}
    if peak.mib is not None:
        cost["cost/peak_memory_mib"] = peak.mib
    keep(cost, state.step)
    return state
