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
from zoo.samplers import default_sampler


def engine() -> Engine:
    return registry.engines.build("torch_engine")


def optimizer() -> Optimizer:
    return registry.optimizers.build("adamw")


def schedule() -> Schedule:
    return registry.schedules.build("cosine")


def recorder() -> Recorder:
    return registry.recorders.build("mlflow")


def sampler(objective: Objective) -> Sampler:
    """The one that what it trains decides; ValueError if nothing does."""
    name = registry.objectives.name_of(objective)
    return registry.samplers.build(default_sampler(name, objective))


def metric(dataset: Dataset) -> Metric:
    """A distance of the points themselves for data that are vectors, else of features."""
    if len(dataset.shape) == 1:
        return FeatureMetrics(extractor=Pixels(), metrics=(registry.metrics.build("mmd"),))
    return registry.metrics.build("feature_metrics")
