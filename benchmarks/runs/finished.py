"""Opens a finished run by the configuration that it kept, to draw samples or to export it.

Its data are not needed where the run recorded what samples need of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import registry
from backbones.network import FlowNetwork
from backbones.pretrained.exported import save_exported
from backbones.pretrained.imports import import_file
from benchmarks.data.pictures import picture
from benchmarks.experiments import defaults
from benchmarks.experiments.arguments import where_to_bind
from benchmarks.experiments.build import run
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.opening import opening
from benchmarks.experiments.recorded_data import (
    RecordedData,
    recorded_data,
    warn_of_other_data,
)
from benchmarks.metrics.feature_metrics import FeatureMetrics
from benchmarks.records.recorders import Null
from benchmarks.runs.result import finished_run, measured_weights, recorded_identity
from benchmarks.runs.samples import draw_samples, samplers_at
from registry import gin_setup
from registry.configuration import own_code
from registry.configuration.gin_errors import message_of
from registry.core import Registry
from registry.folders import file_in
from registry.protocols import Dataset
from trainers.checkpoints.weights import load_module

USUAL_NFE = (1, 2, 4)
DATA_PARTS = (registry.datasets, registry.vaes)
SAMPLING_PARTS = (registry.objectives, registry.time_laws, registry.samplers, registry.paths)
# What only training needs: how it is built where it is not bound, and what may stand in its place.
TRAINING_PARTS: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "recorder": (defaults.recorder, Null),
    "pruner": (lambda: None, lambda: None),
    "metric": (lambda: registry.metrics.build("feature_metrics"), FeatureMetrics),
}

log = logging.getLogger(__name__)


def open_run(
    folder: Path,
    bindings: tuple[str, ...] = (),
    sampler: str | None = None,
    weights: Path | None = None,
    trust_code: bool = False,
) -> tuple[Experiment, FlowNetwork]:
    """The finished run in `folder` with the weights that were measured, on its device.

    `bindings`, a registered `sampler` and a file of `weights` take the place of the run's own.
    Python code that the run's configuration imports is executed only with `trust_code`; without it
    ValueError says what would be.
    """
    measured = finished_run(folder) if weights else measured_weights(folder)
    config, own = file_in(folder, "config.gin"), bindings
    if sampler:
        registry.samplers.get(sampler)  # raises an error that lists the known names
        gin_setup.parse([config], trusted=trust_code, recorded=True)
        arm = arm_of_run()
        bindings = (
            *bindings,
            f"{arm}/run.sampler = @{sampler}()" if arm else f"run.sampler = @{sampler}()",
        )
    gin_setup.parse([config], bindings, trusted=trust_code, recorded=True)
    own_code.warn_of_changes(folder)
    build = partial(_build_data, config, trust_code)
    data = None if _binds(own, DATA_PARTS, "run.dataset") else recorded_data(folder, build)
    changed = _binds(bindings, SAMPLING_PARTS, "run.objective", "run.sampler", "run.nfe")
    with opening(changed=changed):
        experiment = _built({} if data is None else {"dataset": data})
    experiment = replace(experiment, as_recorded=not changed)
    if data is None:
        warn_of_other_data(recorded_identity(folder), experiment.dataset)
    load_module(weights or measured, experiment.net)
    return experiment, experiment.net.to(experiment.device).eval()


def _built(given: Mapping[str, Any]) -> Experiment:
    """The run of the text that was parsed last, with these arguments in the place of its own.

    A part that only training needs, and that cannot be built any more, is replaced with a warning.
    """
    arm = arm_of_run()
    try:
        return _run(arm, given)
    except (ValueError, OSError):
        if not (stand_ins := _stand_ins(arm)):
            raise
    return _run(arm, {**given, **stand_ins})


def _run(arm: str, given: Mapping[str, Any]) -> Experiment:
    for name in given:  # gin would build what is bound beside what is given
        gin_setup.unbind(f"run.{name}")
    with gin_setup.arm(arm):
        experiment: Experiment = run(**given)
    return experiment


def _stand_ins(arm: str) -> dict[str, Any]:
    """Arguments of `run` for the parts of the training that are refused today."""
    found = {}
    for name, (unbound, stand_in) in TRAINING_PARTS.items():
        try:
            _ = gin_setup.build(f"run.{name}", arm) or unbound()
        except (ValueError, OSError) as error:
            log.warning(
                "run.%s is refused today: %s. Nothing is trained here, so the run is opened "
                "without it",
                *(name, message_of(error)),
            )
            found[name] = stand_in()
    return found


def training_data(experiment: Experiment) -> Dataset:
    """The data set itself of a run that was opened; it is built now, if it was not before."""
    dataset = experiment.dataset
    return dataset.original if isinstance(dataset, RecordedData) else dataset


def _binds(bindings: Sequence[str], kinds: Sequence[Registry], *names: str) -> bool:
    """Whether bindings change one of these arguments, a part of these kinds, or a macro.

    A macro may be read anywhere.
    """
    for key in gin_setup.bindings_of("\n".join(bindings)):
        plain = key.split("/")[-1]
        part = plain.rpartition(".")[0].split(".")[-1]
        if "." not in plain or plain in names or any(part in kind for kind in kinds):
            return True
    return False


def _build_data(config: Path, trust_code: bool) -> Dataset:
    """The data set that the run's configuration names, whatever gin holds at this moment."""
    with gin_setup.isolated():
        gin_setup.parse([config], trusted=trust_code, recorded=True)
        arm = arm_of_run()
        with gin_setup.arm(arm):
            dataset: Dataset = gin_setup.build("run.dataset", arm)
        return dataset


def arm_of_run() -> str:
    """The arm of the run whose configuration was parsed last; '' for one outside every arm."""
    return gin_setup.query("Grid.only") or ""


def sample_run(
    folder: Path,
    *,
    nfe: tuple[int, ...],
    num: int,
    seed: int,
    sampler: str | None,
    out: Path,
    weights: Path | None = None,
    bindings: tuple[str, ...] = (),
    trust_code: bool = False,
) -> tuple[Path, tuple[int, ...]]:
    """Draw `num` samples at each NFE from the run in `folder`; the picture's path, and the NFEs.

    Without `nfe` they are 1, 2 and 4, or the run's own where its sampler cannot have these.

    Raises ValueError for a folder without a finished run, an NFE that the sampler cannot have, a
    sampler that the objective is not valid for, and data that cannot be drawn.
    """
    if num < 1:
        raise ValueError(f"the number of samples is {num}; give 1 or more")
    experiment, net = open_run(folder, bindings, sampler, weights, trust_code)
    check_used(bindings, "these samples")
    nfe = nfe or usual_nfe(experiment)
    rows = {f"NFE {n}": x for n, x in draw_samples(experiment, net, nfe, num, seed).items()}
    path = picture(rows, out)
    if path is None:
        raise ValueError(f"samples of shape {experiment.dataset.shape} are no picture")
    return path, nfe


def check_used(bindings: Sequence[str], where: str) -> None:
    """ValueError for bindings that nothing has used since the run was opened."""
    given = set(gin_setup.bindings_of("\n".join(bindings)))
    if unused := sorted(given & {*gin_setup.inert_bindings(arm_of_run())}):
        raise ValueError(f"nothing uses {', '.join(unused)} in {where}{where_to_bind(unused)}")


def usual_nfe(experiment: Experiment) -> tuple[int, ...]:
    """The NFEs of samples for which none are asked for."""
    try:
        samplers_at(experiment, USUAL_NFE)
    except ValueError as problem:
        log.warning("not at %s NFE: %s", ", ".join(map(str, USUAL_NFE)), problem)
        return experiment.nfe
    return USUAL_NFE


def export_run(
    run: Path,
    out: Path,
    weights: Path | None = None,
    bindings: tuple[str, ...] = (),
    trust_code: bool = False,
) -> Path:
    """Write the network of a finished run into the folder `out`, which needs no gin to be read.

    Its weights are those that were measured, unless a file of other `weights` is given.
    """
    experiment, net = open_run(run, bindings, weights=weights, trust_code=trust_code)
    check_used(bindings, "this export")
    return save_exported(
        net,
        out,
        objective=experiment.objective_name,
        sampler=experiment.sampler_name,
        data=experiment.dataset.identity(),
    )


def export_file(
    file: Path,
    out: Path,
    layout: str = "",
    num_heads: int | None = None,
    num_classes: int | None = None,
) -> Path:
    """Convert a public checkpoint into the folder `out`; logs which of its tensors had no use.

    ValueError for a number of classes that does not fit its table of labels.
    """
    imported = import_file(file, layout, num_heads, num_classes)
    if num_classes is not None and imported.num_classes != num_classes:
        raise ValueError(
            f"{file}: --num-classes {num_classes} does not fit its table of labels, which has rows "
            f"for {imported.num_classes} classes and no label (null), or for "
            f"{imported.num_classes + 1} classes alone"
        )
    save_exported(imported.network(), out, layout=imported.layout, source=file.name)
    for note in imported.notes:
        log.warning("%s: %s", file, note)
    for name, reason in imported.unused.items():
        log.info("not needed: %s (%s)", name, reason)
    return out
