"""What is tried on a built run before it may train: its derivative, one loss, its compiler."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace

import torch
from torch import Tensor

import registry
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.guidance_checks import check_guidance
from benchmarks.experiments.opening import for_new_runs, is_opened
from benchmarks.experiments.sampled_steps import check_steps, warn_of_unguided
from registry.configuration.gin_errors import message_of
from registry.protocols import (
    Batch,
    Cond,
    Derivative,
    LossOutput,
    better_of,
    check_batch,
    check_reference,
    has_whole_weights,
    parts,
    to_device,
)
from trainers.derivative_probe import probe_derivatives
from trainers.devices import check_rows
from trainers.engines import TrainStep
from trainers.rng import generator

PROBE_ROWS = 4

log = logging.getLogger(__name__)


def checked(experiment: Experiment) -> Experiment:
    """The experiment with its derivative's error; ValueError if it could not be trained."""
    with for_new_runs():
        check_guidance(
            experiment.objective_name,
            experiment.objective,
            experiment.sampler,
            experiment.net,
            experiment.dataset.num_classes,
        )
    with for_new_runs():
        check_steps(experiment, experiment.nfe)
        warn_of_unguided(experiment)
    if is_opened():  # its data may be gone, and nothing is trained
        return experiment
    check_batch(experiment.engine, experiment.batch_size)
    better_of(experiment.metric)
    _warn_of_coupling(experiment)
    shape = experiment.dataset.shape
    check_rows("run.batch_size", experiment.batch_size, shape)
    check_rows("run.num_samples", experiment.num_samples, shape)
    experiment = replace(experiment, derivative_error=_probe(experiment))
    if experiment.compile:
        _check_compile(experiment)
    return experiment


def _warn_of_coupling(experiment: Experiment) -> None:
    """Say so where a coupling of rows finds hardly any rows of the same label in a batch."""
    num_classes, batch_size = experiment.dataset.num_classes, experiment.batch_size
    for path, part in parts(experiment.objective):
        kind = registry.kind_of(part)
        if kind is registry.couplings and getattr(part, "couples_rows", False):
            if batch_size < 2 * num_classes:
                log.warning(
                    "%s.%s = @%s() pairs data and noise of the same label, and a batch of %d has "
                    "%.2g rows a label of %d: it changes little. Raise run.batch_size, or bind "
                    "@independent()",
                    *(experiment.objective_name, path, kind.name_of(part), batch_size),
                    *(batch_size / num_classes, num_classes),
                )


def _probe(experiment: Experiment) -> dict[str, float]:
    """The derivative's error, after one loss on the same few rows was computed.

    The run's own random streams do not see these draws.
    """
    dataset, seed = experiment.dataset, experiment.seed
    x0, cond = check_reference(dataset, PROBE_ROWS, seed)
    step = TrainStep(experiment.net, experiment.objective)
    where = f"objective {experiment.objective_name!r} on {PROBE_ROWS} rows of {dataset.name}"
    try:
        derivative_error = _derivative_error(experiment, x0, cond)
        with torch.no_grad():
            out = step(Batch(x0=x0, cond=cond), generator(seed, 0, 0))
    except Exception as error:
        raise ValueError(f"{where}: {message_of(error)}") from error
    if not (isinstance(out, LossOutput) and out.per_sample.ndim == 1):
        raise ValueError(
            f"{where}: loss() gave {type(out).__name__}; it must give a LossOutput whose "
            "per_sample has one number a row, [b]"
        )
    return derivative_error


def _derivative_error(experiment: Experiment, x0: Tensor, cond: Cond | None) -> dict[str, float]:
    device = experiment.device
    return probe_derivatives(
        experiment.objective,
        experiment.net,
        x0.to(device),
        to_device(cond, device),
        experiment.engine.autocast(device),
    )


def _check_compile(experiment: Experiment) -> None:
    """ValueError where nothing can be compiled; a warning of what is not compiled."""
    if not has_whole_weights(experiment.engine):
        name = registry.engines.name_of(experiment.engine)
        raise ValueError(
            f"run.compile = True needs weights that are whole while the network runs, and "
            f"run.engine = @{name}() does not keep them so with these settings. Set "
            "zero_engine.stage = 2, choose another engine, or set run.compile = False"
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"run.compile = True needs a C++ compiler, and there is no {compiler!r}. Install g++, "
            "name another one in the variable CXX, or set run.compile = False"
        )
    if any(isinstance(part, Derivative) for _, part in parts(experiment.objective)):
        log.warning("run.compile: networks are compiled, derivatives of them are not")
