"""Samples from a finished run, by the configuration that the run kept."""

from __future__ import annotations

from pathlib import Path

import registry
from backbones.network import FlowNetwork
from benchmarks import comparison  # noqa: F401  registers Grid
from benchmarks.experiment import Experiment, run
from benchmarks.results import finished_run
from benchmarks.runner import picture
from benchmarks.shown import draw_samples
from registry import gin_setup
from trainers.weights import load_module


def open_run(
    folder: Path,
    bindings: tuple[str, ...] = (),
    sampler: str | None = None,
    weights: Path | None = None,
) -> tuple[Experiment, FlowNetwork]:
    """The finished run in `folder` with the weights that were measured, on its device.

    `bindings`, a registered `sampler` and a file of `weights` go before those of the run.
    """
    measured = finished_run(folder)
    if sampler:
        registry.samplers.get(sampler)  # says which there are
        gin_setup.parse([folder / "config.gin"])
        arm = arm_of_run()
        bindings = (
            *bindings,
            f"{arm}/run.sampler = @{sampler}()" if arm else f"run.sampler = @{sampler}()",
        )
    gin_setup.parse([folder / "config.gin"], bindings)
    with gin_setup.arm(arm_of_run()):
        experiment = run()
    load_module(weights or measured, experiment.net)
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
) -> Path:
    """Draw `num` samples at each NFE from the run in `folder`; the picture's path.

    Raises ValueError for a folder without a finished run, an NFE that the sampler cannot have, a
    sampler that the objective is not valid for, and data that cannot be drawn.
    """
    if num < 1:
        raise ValueError(f"the number of samples is {num}; give 1 or more")
    experiment, net = open_run(folder, bindings, sampler=sampler, weights=weights)
    rows = {f"NFE {n}": x for n, x in draw_samples(experiment, net, nfe, num, seed).items()}
    path = picture(rows, out)
    if path is None:
        raise ValueError(f"samples of shape {experiment.dataset.shape} are no picture")
    return path
