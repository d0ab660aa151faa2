"""Opens a finished run by the configuration that it kept, to draw samples or to export it.

Its data are not needed where the run recorded what samples need of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import registry
from backbones.network import FlowNetwork
from backbones.pretrained.exported import save_exported
from backbones.pretrained.imports import import_file
from benchmarks.data.pictures import picture
from benchmarks.experiments.build import run
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.recorded_data import (
    RecordedData,
    recorded_data,
    warn_of_other_data,
)
from benchmarks.experiments.sampled_steps import possible_nfe
from benchmarks.runs.result import finished_run, measured_weights, recorded_identity
from benchmarks.runs.samples import SHOWN_NFE, draw_samples
from registry import gin_setup
from registry.configuration import own_code
from registry.folders import file_in
from registry.protocols import Dataset
from trainers.checkpoints.weights import load_module

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
        gin_setup.parse([config], trusted=trust_code)
        arm = arm_of_run()
        bindings = (
            *bindings,
            f"{arm}/run.sampler = @{sampler}()" if arm else f"run.sampler = @{sampler}()",
        )
    gin_setup.parse([config], bindings, trusted=trust_code)
    own_code.warn_of_changes(folder)
    build = partial(_build_data, config, trust_code)
    data = None if _binds_data(own) else recorded_data(folder, build)
    if data is not None:
        gin_setup.unbind("run.dataset")
    with gin_setup.arm(arm_of_run()):
        experiment = run() if data is None else run(dataset=data)
    if data is None:
        warn_of_other_data(recorded_identity(folder), experiment.dataset)
    load_module(weights or measured, experiment.net)
    return experiment, experiment.net.to(experiment.device).eval()


def training_data(experiment: Experiment) -> Dataset:
    """The data set itself of a run that was opened; it is built now, if it was not before."""
    dataset = experiment.dataset
    return dataset.original if isinstance(dataset, RecordedData) else dataset


def _binds_data(bindings: Sequence[str]) -> bool:
    """Whether bindings change the data set, or a macro, which the data set may read."""
    for key in gin_setup.bindings_of("\n".join(bindings)):
        plain = key.split("/")[-1]
        part = plain.rpartition(".")[0].split(".")[-1]
        if "." not in plain or plain == "run.dataset":
            return True
        if part in registry.datasets or part in registry.vaes:
            return True
    return False


def _build_data(config: Path, trust_code: bool) -> Dataset:
    """The data set that the run's configuration names, whatever gin holds at this moment."""
    with gin_setup.isolated():
        gin_setup.parse([config], trusted=trust_code)
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
) -> Path:
    """Draw `num` samples at each NFE from the run in `folder`; the picture's path.

    Without `nfe` they are those of `SHOWN_NFE` that the sampler can have.
    Raises ValueError for a folder without a finished run, an NFE that the sampler cannot have, a
    sampler that the objective is not valid for, and data that cannot be drawn.
    """
    if num < 1:
        raise ValueError(f"the number of samples is {num}; give 1 or more")
    experiment, net = open_run(folder, bindings, sampler, weights, trust_code)
    nfe = nfe or possible_nfe(experiment.sampler, SHOWN_NFE)
    rows = {f"NFE {n}": x for n, x in draw_samples(experiment, net, nfe, num, seed).items()}
    path = picture(rows, out)
    if path is None:
        raise ValueError(f"samples of shape {experiment.dataset.shape} are no picture")
    return path


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
