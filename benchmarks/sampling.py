"""Samples from a finished run, by the configuration that the run kept."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.experiment import run
from benchmarks.runner import MODEL, draw_samples, load_run, picture
from registry import gin_setup

_COMMAND = re.compile(r"# objective-zoo run .*? --arm (\w+)")


def sample_run(
    folder: Path, *, nfe: tuple[int, ...], num: int, seed: int, sampler: str | None, out: Path
) -> Path:
    """Draw `num` samples at each NFE from the run in `folder`; the picture's path.

    Raises ValueError for a folder without a finished run, an NFE that the sampler cannot have, a
    sampler that the objective is not valid for, and data that cannot be drawn.
    """
    if not (folder / MODEL).exists():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{MODEL}"))
        hint = f" There are runs in it: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} holds no finished run (no {MODEL}).{hint}")
    config = folder / "config.gin"
    command = _COMMAND.match(config.read_text())
    arm = command.group(1) if command else ""
    scope = f"{arm}/" if arm else ""
    bindings = [f"{scope}run.sampler = @{sampler}()"] if sampler else []
    gin_setup.parse([config], bindings)
    with gin_setup.arm(arm):
        experiment = run()
    net = load_run(experiment, folder)
    rows = {f"NFE {n}": x for n, x in draw_samples(experiment, net, nfe, num, seed).items()}
    path = picture(rows, out)
    if path is None:
        raise ValueError(f"samples of shape {experiment.dataset.shape} are no picture")
    return path
