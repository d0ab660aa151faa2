"""Opens a finished run by the configuration that it kept, to draw samples or to export it."""

from __future__ import annotations

import logging
from pathlib import Path

import registry
from backbones.network import FlowNetwork
from backbones.pretrained.exported import save_exported
from backbones.pretrained.imports import import_file
from benchmarks.data.pictures import picture
from benchmarks.experiments.build import run
from benchmarks.experiments.experiment import Experiment
from benchmarks.runs.result import finished_run, measured_weights
from benchmarks.runs.samples import draw_samples
from registry import gin_setup, own_code
from registry.folders import file_in
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
    own = finished_run(folder) if weights else measured_weights(folder)
    config = file_in(folder, "config.gin")
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
    with gin_setup.arm(arm_of_run()):
        experiment = run()
    load_module(weights or own, experiment.net)
    return experiment, experiment.net.to(experiment.device).eval()


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

    Raises ValueError for a folder without a finished run, an NFE that the sampler cannot have, a
    sampler that the objective is not valid for, and data that cannot be drawn.
    """
    if num < 1:
        raise ValueError(f"the number of samples is {num}; give 1 or more")
    experiment, net = open_run(folder, bindings, sampler, weights, trust_code)
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
