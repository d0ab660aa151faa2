"""Numbers that change over a run, as functions of the part of it that is over, in [0, 1]."""

from __future__ import annotations

import math


def sigmoid_ramp(progress: float, ramp: tuple[float, float], temperature: float) -> float:
    """0 before and 1 after the part (start, end) of the run, and between them a sigmoid.

    It is sigmoid(temperature (p - 1/2)), where p goes from 0 at the start to 1 at the end. So it
    jumps by sigmoid(-temperature / 2) at both.
    """
    start, end = ramp
    if not start < progress < end:
        return float(progress >= end)
    return 1 / (1 + math.exp(-temperature * ((progress - start) / (end - start) - 0.5)))
