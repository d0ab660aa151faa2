"""An average of the weights whose width is chosen after training, from a run's snapshots.

Memory holds the result, and beside it two copies of one tensor at a time.
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

LARGE_ERROR = 0.1  # of a profile, worth a warning

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file of weights that `reconstruct` wrote; `error` is that of `Mixture`."""

    path: Path
    wanted: Profile
    error: float
    num_snapshots: int


def reconstruct(run: Path, width: float, step: int | None = None, out: Path | None = None) -> Made:
    """Write the average of any relative width at any step up to the last one, the default.

    A warning says when the stored averages cannot make it well.
    """
    exponent(width)
    averages = stored(run)
    profiles = [average.profile for average in averages]
    last = max(profile.step for profile in profiles)
    wanted = Profile(last if step is None else step, width)
    if wanted.step > last:
        raise ValueError(f"step {wanted.step} lies behind the last snapshot, that of step {last}")
    found = mixture(profiles, wanted)
    if found.error > LARGE_ERROR:
        _warn(profiles, wanted, found.error)
    tensors = _combined(averages, found.coefficients, wanted.step)
    name = f"ema_width_{width:g}" + ("" if step is None else f"_step_{step}")
    out = out or run / f"{name}.safetensors"
    about = {"width": str(width), "step": str(wanted.step), "error": str(found.error)}
    with whole_file(out) as aside:
        save_tensors(aside, tensors, about)
    steps = {profile.step for profile in profiles}
    return Made(path=out, wanted=wanted, error=found.error, num_snapshots=len(steps))


def _warn(profiles: Sequence[Profile], wanted: Profile, error: float) -> None:
    widths = sorted({profile.width for profile in profiles})
    steps = sorted({profile.step for profile in profiles})
    log.warning(
        "the profile of width %g at step %d is missed by %.0f %%. Stored are the widths %s at %d "
        "steps, the nearest of which is %d",
        *(wanted.width, wanted.step, 100 * error, ", ".join(f"{width:g}" for width in widths)),
        *(len(steps), min(steps, key=lambda there: abs(there - wanted.step))),
    )


def _combined(
    averages: Sequence[Stored], coefficients: Sequence[float], step: int
) -> dict[str, Tensor]:
    """In float64, a tensor at a time; buffers are those of the last snapshot up to the step."""
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
