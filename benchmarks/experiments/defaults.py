"""The parts of a run for which nothing is bound; their settings come from gin as usual."""

from __future__ import annotations

import registry
from benchmarks.metrics.feature_metrics import FeatureMetrics
from benchmarks.metrics.features import Pixels
from registry.protocols import (
    Dataset,
    Engine,
    Metric,
    Objective,
    Optimizer,
    Recorder,
    Sampler,
    Schedule,
)
from zoo.samplers import valid_samplers


def engine() -> Engine:
    return registry.engines.build("torch_engine")


def optimizer() -> Optimizer:
    return registry.optimizers.build("adamw")


def schedule() -> Schedule:
    return registry.schedules.build("cosine")


def recorder() -> Recorder:
    return registry.recorders.build("mlflow")


def sampler(objective: Objective) -> Sampler:
    """The first that is valid for the objective; ValueError if there is none."""
    valid = valid_samplers(objective)
    if not valid:
        name = registry.objectives.name_of(objective)
        raise ValueError(f"no registered sampler reads the outputs of objective {name!r}")
    return registry.samplers.build(valid[0])


def metric(dataset: Dataset) -> Metric:
    """A distance of the points themselves for data that are vectors, else of features."""
    if len(dataset.shape) == 1:
        return FeatureMetrics(extractor=Pixels(), metrics=(registry.metrics.build("mmd"),))
    return registry.metrics.build("feature_metrics")
