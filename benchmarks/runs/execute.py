"""What one run does: train its teacher or its start first, train, sample, measure, record.

The run's folder holds

    config.gin  operative.gin  objective.txt     what it was
    record.jsonl                                 what happened, step by step (records/jsonl.py)
    checkpoints/  teacher/checkpoints/           to continue it; pretrain/ is like teacher/
    ema_snapshots/                               averages of any width (trainers/ema/snapshots.py)
    model.safetensors  teacher/model.safetensors the averaged weights that were measured
    samples.safetensors  samples.png             drawn from the same noise in every run of a seed
    samples/  real.safetensors                   for a report: samples while it trained, real data
    data.json                                    what samples need of the data
    result.json                                  the figures; a run that has one is finished
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.data.pictures import is_points, picture
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.recorded_data import record_data, warn_of_other_data
from benchmarks.experiments.sampled_steps import guidance_in_words
from benchmarks.metrics import evaluate
from benchmarks.records.provenance import provenance
from benchmarks.runs.measure import measure
from benchmarks.runs.passes import passes_per_step
from benchmarks.runs.pretraining import after_first, train_first
from benchmarks.runs.result import MODEL, RESULT, Result, recorded_identity
from benchmarks.runs.samples import final_samples, keep_all
from benchmarks.runs.training import fit_experiment
from registry.protocols import RunRecord, better_of, provider_files
from trainers import ranks
from trainers.checkpoints.weights import save_module
from trainers.checkpoints.whole_files import file_sha256
from trainers.engines import feature_sha256

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The gin text that made the run, and the part of it that took effect."""

    config: str
    operative: str
    params: Mapping[str, str]


def execute(
    experiment: Experiment, texts: Texts, record: RunRecord, folder: Path, *, resume: bool = False
) -> Result:
    """Run it in `folder`, or continue what is there; the result is saved and returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.rglob(f".{MODEL}.*.partial") if ranks.leads() else ():
        left.unlink()  # of a process that was killed while it wrote the weights
    if resume:
        warn_of_other_data(recorded_identity(folder), experiment.dataset)
    if ranks.leads():
        record_data(experiment.dataset, folder)
    _describe(experiment, texts, record)
    # As paths alone: weights are too large for a store of records.
    where = {"checkpoints": folder / "checkpoints", "weights": folder / MODEL}
    record.tags({name: str(path.resolve()) for name, path in where.items()})
    first = train_first(experiment, record, folder, resume)
    if first.what:
        experiment = after_first(experiment)

    record.metrics({"cost/passes_per_step": passes_per_step(experiment).total}, 0)
    state = fit_experiment(experiment, record, folder, resume)
    net = state.ema_net
    unsaved = _Unsaved()
    unsaved.attempt(partial(save_module, folder / MODEL, net))
    saved = unsaved.problem is None
    values = dict(measure(experiment, net))
    record.metrics(values, state.step)
    unsaved.attempt(partial(_keep_samples, experiment, net, state.images, record, folder))
    result = Result(
        name=record.name,
        objective=experiment.objective_name,
        backbone=experiment.backbone_name,
        sampler=experiment.sampler_name,
        seed=experiment.seed,
        values=values,
        num_params=experiment.num_params,
        steps=state.step + first.steps,
        images=state.images + first.images,
        seconds=state.seconds + first.seconds,
        **first.as_result,
        weights_sha256=file_sha256(folder / MODEL) if saved and ranks.leads() else "",
        better=better_of(experiment.metric),
    )
    totals = {"steps": result.steps, "images": result.images, "seconds": result.seconds}
    record.metrics({f"cost/{name}": value for name, value in totals.items()}, state.step)
    if ranks.leads():
        if unsaved.problem is None:
            unsaved.attempt(partial(result.save, folder))
        unsaved.tell(result)
        record.artifact(folder / RESULT)
    return result


class _Unsaved:
    """What a full disk does not take at the end of a run, when the figures are not yet known.

    A run has a result only if everything before it was saved.
    """

    problem: OSError | None = None

    def attempt(self, save: Callable[[], object]) -> None:
        """Call `save`, in which all processes may have to take part."""
        try:
            save()
        except OSError as problem:
            self.problem = self.problem or problem

    def tell(self, result: Result) -> None:
        """Raise the error, if there was one, after the figures were logged."""
        if self.problem is None:
            return
        figures = ", ".join(f"{name} = {value:.6g}" for name, value in result.values.items())
        log.error(
            "%s: the run came to its end at step %d, and its result cannot be saved. It found %s. "
            "With room on the disk, --resume goes on from the last checkpoint",
            *(result.name, result.steps, figures),
        )
        raise self.problem


def _keep_samples(
    experiment: Experiment,
    net: Callable[..., Any],
    images_seen: int,
    record: RunRecord,
    folder: Path,
) -> None:
    points = is_points(experiment.dataset.shape)
    samples = final_samples(experiment, net)
    if not ranks.leads():
        return
    keep_all(experiment, samples, images_seen, folder)
    rows = {f"NFE {n}": x if points else x[:20] for n, x in samples.items()}
    reference = None
    if points:
        drawn, _ = experiment.dataset.reference(experiment.num_samples, experiment.seed)
        reference = evaluate.decoded(experiment.dataset, drawn)
    if path := picture(rows, folder / "samples.png", reference):
        record.artifact(path)


def _describe(experiment: Experiment, texts: Texts, record: RunRecord) -> None:
    record.tags(
        {
            "objective": experiment.objective_name,
            "backbone": experiment.backbone_name,
            "sampler": experiment.sampler_name,
            "data": experiment.dataset.identity(),
            "guidance": guidance_in_words(experiment),
            **provenance(),
        }
    )
    known = feature_sha256(experiment.objective)
    record.tags({f"{field}.sha256": sha256 for field, sha256 in known.items()})
    measuring = evaluate.provenance(
        experiment.metric, experiment.dataset, experiment.num_samples, experiment.seed
    )
    record.tags({f"measured.{name}": value for name, value in measuring.items()})
    record.params({**texts.params, "parameters": experiment.num_params})
    if experiment.derivative_error:
        record.metrics(experiment.derivative_error, step=0)
    for name, text in provider_files(experiment.engine, experiment.batch_size).items():
        record.text(text, name)
    record.text(texts.config, "config.gin")
    record.text(texts.operative, "operative.gin")
    record.text(f"{experiment.objective!r}\n", "objective.txt")
