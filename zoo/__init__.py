"""The mathematics: paths, time laws, derivatives, objectives and samplers.

Importing this package registers them all.
"""

from zoo import (
    couplings,
    features,
    guidance,
    objectives,
    paths,
    residuals,
    samplers,
    teachers,
    times,
    weighting,
)
from zoo.derivatives import methods, one_pass
from zoo.points import velocities

__all__ = [
    "couplings",
    "features",
    "guidance",
    "methods",
    "objectives",
    "one_pass",
    "paths",
    "residuals",
    "samplers",
    "teachers",
    "times",
    "velocities",
    "weighting",
]
