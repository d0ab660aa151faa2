"""An explicit Runge-Kutta solver that forward-mode derivatives pass through.

DOP853 (order 8; Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I) with the
tableau and error estimate of scipy. The steps are chosen from detached values and shared by the
batch, so dual numbers see a fixed composition of smooth operations: the tangent is the same method
applied to the variational equation, on the same steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.integrate import DOP853
from torch import Tensor

_MAX_STEPS = 10_000
_SMALLEST_STEP = 1e-12


def integrate(slope: Callable[[float, Tensor], Tensor], y: Tensor, rtol: float) -> Tensor:
    """The solution y(1) [b D] of y' = slope(s, y), y(0) = y.

    The error of each step is at most rtol (1 + |y|) in every row. RuntimeError if that needs steps
    that are too small or too many.
    """
    if not len(y):
        return y
    a, b, c, *estimates = (
        torch.as_tensor(m, dtype=y.dtype, device=y.device)
        for m in (DOP853.A, DOP853.B, DOP853.C, DOP853.E3[:-1], DOP853.E5[:-1])
    )
    s, step = 0.0, 0.1
    first = slope(s, y)
    for _ in range(_MAX_STEPS):
        if step < _SMALLEST_STEP:
            break
        step = min(step, 1 - s)
        stages = [first]
        for i in range(1, len(b)):
            ahead = y + _combine(step * a[i, :i], stages)
            stages.append(slope(s + float(c[i]) * step, ahead))
        candidate = y + _combine(step * b, stages)
        error = _error(stages, estimates, torch.maximum(y.detach().abs(), candidate.detach().abs()))
        error *= step / rtol
        if error < 1:
            s, y = s + step, candidate
            if 1 - s < _SMALLEST_STEP:
                return y
            first = slope(s, y)
        # Hairer's rule: the local error is of order 8; 0.9 is its safety factor.
        step *= min(5.0, max(0.2, 0.9 * max(error, 1e-16) ** (-1 / 8)))
    raise RuntimeError(
        f"no solution: {s:.3g} of the interval done, the step is down to {step:.1g}. Either the "
        "input is not finite or the mixture is too stiff: use larger stds, r > 0 or a larger rtol"
    )


def _combine(weights: Tensor, stages: list[Tensor]) -> Tensor:
    return torch.tensordot(weights, torch.stack(stages), 1)


def _error(stages: list[Tensor], estimates: list[Tensor], size: Tensor) -> float:
    """The largest error of a row per unit step, relative to 1 + size.

    nan counts as infinite, so that `integrate` refuses the step and takes a shorter one, and raises
    where no step is short enough.
    """
    detached = [stage.detach() for stage in stages]
    third, fifth = ((_combine(e, detached) / (1 + size)).norm(dim=1) for e in estimates)
    blend = fifth**2 / (fifth**2 + 0.01 * third**2).sqrt().clamp_min(1e-300)
    return float(blend.nan_to_num(nan=float("inf")).max()) / size.shape[1] ** 0.5
