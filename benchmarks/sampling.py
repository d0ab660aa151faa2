"""Samples from a finished run, by the configuration that the run kept."""

from __future__ import annotations

from pathlib import Path

import registry
from benchmarks import comparison  # noqa: F401  registers Grid
from benchmarks.experiment import run
from benchmarks.results import finished_run
from benchmarks.runner import load_run, picture
from benchmarks.shown import draw_samples
from registry import gin_setup


def sample_run(
    folder: Path, *, nfe: tuple[int, ...], num: int, seed: int, sampler: str | None, out: Path
) -> Path:
    """Draw `num` samples at each NFE from the run in `folder`; the picture's path.

    Raises ValueError for a folder without a finished run, an NFE that the sampler cannot have, a
    sampler that the objective is not valid for, and data that cannot be drawn.
    """
    finished_run(folder)
    if num < 1:
        raise ValueError(f"the number of samples is {num}; give 1 or more")
    gin_setup.parse([folder / "config.gin"])
    arm = gin_setup.query("Grid.only", "")
    if sampler:
        registry.samplers.get(sampler)  # says which there are
        scope = f"{arm}/" if arm else ""
        gin_setup.parse([folder / "config.gin"], [f"{scope}run.sampler = @{sampler}()"])
    with gin_setup.arm(arm):
        experiment = run()
    net = load_run(experiment, folder)
    rows = {f"NFE {n}": x for n, x in draw_samples(experiment, net, nfe, num, seed).items()}
    path = picture(rows, out)
    if path is None:
        raise ValueError(f"samples of shape {experiment.dataset.shape} are no picture")
    return path
