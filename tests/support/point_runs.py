"""A run of four steps on points, to be built with other arguments."""

from __future__ import annotations

from functools import partial
from typing import Any

from backbones.mlp import MLP
from benchmarks.data.mixtures import Gaussian
from benchmarks.experiments import build
from benchmarks.experiments.experiment import Experiment
from benchmarks.records.recorders import Null


def point_run(**changes: Any) -> Experiment:
    arguments = {
        "backbone": partial(MLP, dim=16, depth=1),
        "dataset": Gaussian(mean=(0.5, -0.5), std=(0.5, 1.0)),
        "recorder": Null(),
        "steps": 4,
        "batch_size": 8,
        "num_samples": 8,
        "nfe": (1,),
        "log_every": 1,
        "device": "cpu",
    }
    return build.run(**{**arguments, **changes})
