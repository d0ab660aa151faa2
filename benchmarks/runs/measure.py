"""The values that an evaluation of a run gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.experiments.experiment import Experiment
from benchmarks.metrics import evaluate
from benchmarks.metrics.flow_map_error import ClosedForm, map_error

PROBE_SAMPLES = 16


def measured_names(experiment: Experiment, wanted: str) -> tuple[str, ...]:
    """The names of the values that an evaluation gives, found by a small evaluation.

    It runs at the NFE that `wanted` names, or at all of the run's if it names none.
    """
    nfe = tuple(n for n in experiment.nfe if wanted.startswith(f"nfe{n}/")) or experiment.nfe
    return tuple(measure(replace(experiment, nfe=nfe, num_samples=PROBE_SAMPLES), experiment.net))


def measure(experiment: Experiment, net: Callable[..., Any]) -> Mapping[str, float]:
    values = dict(
        evaluate.evaluate(
            net,
            experiment.sampler,
            experiment.nfe,
            experiment.metric,
            experiment.dataset,
            experiment.num_samples,
            experiment.seed,
            device=experiment.device,
        )
    )
    if isinstance(experiment.dataset, ClosedForm):
        values |= dict(
            map_error(
                net, experiment.dataset, device=experiment.device, objective=experiment.objective
            )
        )
    return values
