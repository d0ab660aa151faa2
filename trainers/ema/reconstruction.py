"""Makes an average of the weights from a run's snapshots; its width is chosen after training.

The memory holds the result and, at any time, two more copies of one tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from backbones.pretrained.tensors import save_tensors
from trainers.checkpoints.whole_files import whole_file
from trainers.ema.power_function import Profile, exponent, mixture
from trainers.ema.snapshots import Stored, stored

LARGE_ERROR = 0.1  # a warning is given if more than this share of a profile is missed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A file of weights that `reconstruct` wrote; `error` is that of `ProfileMixture`."""

    path: Path
    wanted: Profile
    error: float
    num_snapshots: int


def reconstruct(
    run: Path, sigma_rel: float, step: int | None = None, out: Path | None = None
) -> Reconstruction:
    """Write the average of relative width `sigma_rel` as it was at `step`; default: the last step.

    A warning is given if the stored averages cannot make it well. The file is called
    ema_width_... as in version 0.1, so that scripts which name it, and evaluations of it, go on.
    """
    exponent(sigma_rel)
    averages = stored(run)
    profiles = [average.profile for average in averages]
    last = max(profile.step for profile in profiles)
    wanted = Profile(last if step is None else step, sigma_rel)
    if wanted.step > last:
        raise ValueError(
            f"step {wanted.step} comes after the last snapshot, which is of step {last}"
        )
    found = mixture(profiles, wanted)
    if found.error > LARGE_ERROR:
        _warn(profiles, wanted, found.error)
    tensors = _combined(averages, found.coefficients, wanted.step)
    name = f"ema_width_{sigma_rel:g}" + ("" if step is None else f"_step_{step}")
    out = out or run / f"{name}.safetensors"
    about = {"width": str(sigma_rel), "step": str(wanted.step), "error": str(found.error)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as aside:
        save_tensors(aside, tensors, about, digest=True)
    steps = {profile.step for profile in profiles}
    return Reconstruction(path=out, wanted=wanted, error=found.error, num_snapshots=len(steps))


def _warn(profiles: Sequence[Profile], wanted: Profile, error: float) -> None:
    sigma_rels = sorted({profile.sigma_rel for profile in profiles})
    steps = sorted({profile.step for profile in profiles})
    log.warning(
        "the profile of sigma_rel = %g at step %d is missed by %.0f %%. The snapshots have "
        "sigma_rel = %s at %d steps, and the nearest of these is %d",
        *(wanted.sigma_rel, wanted.step, 100 * error, ", ".join(f"{s:g}" for s in sigma_rels)),
        *(len(steps), min(steps, key=lambda there: abs(there - wanted.step))),
    )


def _combined(
    averages: Sequence[Stored], coefficients: Sequence[float], step: int
) -> dict[str, Tensor]:
    """The sums, in float64 and one tensor at a time.

    Buffers are not averaged: they are those of the last snapshot that is not after the step.
    """
    earlier = [average for average in averages if average.profile.step <= step]
    current = max(earlier or averages[:1], key=lambda average: average.profile.step)
    with ExitStack() as files:

        def opened(average: Stored) -> Any:
            return files.enter_context(safe_open(average.path, framework="pt"))

        used = [(x, opened(a)) for x, a in zip(coefficients, averages, strict=True) if x]
        of_step = opened(current)

        def tensor(name: str) -> Tensor:
            here = of_step.get_tensor(name)
            if name in current.buffers:
                return here
            total = torch.zeros_like(here, dtype=torch.float64)
            for coefficient, file in used:
                total.add_(file.get_tensor(name).double(), alpha=coefficient)
            return total.to(here.dtype)

        return {name: tensor(name) for name in of_step.keys()}
