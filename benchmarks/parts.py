"""Every part that ships with the project; importing this registers all of them."""

import backbones
import trainers.engines
import trainers.optim
import zoo
from benchmarks import (
    datasets,
    distances,
    features,
    launchers,
    metrics,
    pruning,
    subprocesses,
    tracking,
)

__all__ = [
    "backbones",
    "datasets",
    "distances",
    "features",
    "launchers",
    "metrics",
    "pruning",
    "subprocesses",
    "tracking",
    "trainers",
    "zoo",
]
