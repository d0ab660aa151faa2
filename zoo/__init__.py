"""The mathematics: paths, time laws, derivatives, objectives and samplers.

Importing it registers them all.
"""

from zoo import (
    couplings,
    derivatives,
    objectives,
    one_pass,
    paths,
    residuals,
    samplers,
    teachers,
    times,
    weighting,
)

__all__ = [
    "couplings",
    "derivatives",
    "objectives",
    "one_pass",
    "paths",
    "residuals",
    "samplers",
    "teachers",
    "times",
    "weighting",
]
