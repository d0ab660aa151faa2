"""What is tried on a built run before it may train: its derivative, one loss, its compiler."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

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
    Share,
    TimeLaw,
    better_of,
    check_batch,
    check_groups,
    check_reference,
    group_of,
    has_whole_weights,
    parts,
    read_share,
    to_device,
)
from trainers.derivative_probe import probe_derivatives
from trainers.devices import check_rows
from trainers.engines import TrainStep
from trainers.rng import generator
from zoo.dropout import shares_dropout

PROBE_ROWS = 4
# Parts that may couple rows of the same label, and which of their kind does not.
_PLAIN = {registry.couplings: "independent", registry.velocities: "conditional"}

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
    group = group_of(experiment.objective)
    check_batch(experiment.engine, experiment.batch_size, group)
    _check_path(experiment)
    check_groups(experiment.dataset, group)
    better_of(experiment.metric)
    _warn_of_coupling(experiment)
    shape = experiment.dataset.shape
    check_rows("run.batch_size", experiment.batch_size, shape)
    check_rows("run.num_samples", experiment.num_samples, shape)
    experiment = replace(experiment, derivative_error=_probe(experiment))
    if experiment.compile:
        _check_compile(experiment)
    return experiment


def _check_path(experiment: Experiment) -> None:
    """ValueError for a parametrisation whose equation holds on another path than the objective's.

    On another path a readout would stand for something else than what the parametrisation says.
    """
    meaning, path = experiment.net.parametrisation, getattr(experiment.objective, "path", None)
    wanted = getattr(type(meaning), "on_path", None)
    if wanted is None or registry.kind_of(path) is not registry.paths:
        return
    if (found := registry.paths.name_of(path)) != wanted:
        name = registry.parametrisations.name_of(meaning)
        fit = [
            other
            for other in registry.parametrisations.names()
            if getattr(registry.parametrisations.get(other), "on_path", found) == found
        ]
        raise ValueError(
            f"run.parametrisation = @{name}() holds on the path {wanted!r}, and the path of "
            f"{experiment.objective_name} is {found!r}. Bind {experiment.objective_name}.path = "
            f"@{wanted}(), or a parametrisation that holds on {found!r}: {', '.join(fit)}"
        )


def _warn_of_coupling(experiment: Experiment) -> None:
    """Say so where a part that couples rows finds hardly any of the same label in a batch."""
    num_classes, batch_size = experiment.dataset.num_classes, experiment.batch_size
    for path, part in parts(experiment.objective):
        kind = registry.kind_of(part)
        if kind in _PLAIN and getattr(part, "couples_rows", False):
            if batch_size < 2 * num_classes:
                log.warning(
                    "%s.%s = @%s() works on rows of the same label, and a batch of %d has %.2g "
                    "rows a label of %d: it changes little. Raise run.batch_size, or bind @%s()",
                    *(experiment.objective_name, path, kind.name_of(part), batch_size),
                    *(batch_size / num_classes, num_classes, _PLAIN[kind]),
                )


def _probe(experiment: Experiment) -> dict[str, float]:
    """The derivative's error, after one loss on the same few rows was computed.

    The run's own random streams do not see these draws.
    """
    dataset, seed = experiment.dataset, experiment.seed
    x0, cond = check_reference(dataset, PROBE_ROWS, seed)
    objective, laws = _with_watched_laws(experiment.objective)
    step = TrainStep(experiment.net, objective)
    if step.group > 1:
        rows = max(1, PROBE_ROWS // step.group) * step.group
        x0, cond = read_share(dataset, 0, rows, seed, Share(group=step.group))
    where = f"objective {experiment.objective_name!r} on {len(x0)} rows of {dataset.name}"
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
    for name, law in laws.items():
        if not law.asked:
            raise ValueError(
                f"{where}: {experiment.objective_name}.{name} = "
                f"@{registry.time_laws.name_of(law.law)}() changes over the run, and loss() does "
                f"not ask for the law of batch.step. Draw by zoo.times.law_at(self.{name}, "
                "batch.step), or bind another law"
            )
    return derivative_error


@dataclass
class _Watched:
    """A time law that changes over the run, and whether it was asked for the law of a step."""

    law: Any
    asked: bool = False

    def at_step(self, step: int) -> TimeLaw:
        self.asked = True
        found: TimeLaw = self.law.at_step(step)
        return found

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.law(n, rng)
        return found

    def num_off_diagonal(self, n: int) -> int:
        return int(self.law.num_off_diagonal(n))


def _with_watched_laws(objective: Any) -> tuple[Any, dict[str, _Watched]]:
    """The objective with its laws that change over the run watched, and these by their field."""
    names = [f.name for f in fields(objective)] if is_dataclass(objective) else []
    laws = {
        name: _Watched(law) for name in names if hasattr(law := getattr(objective, name), "at_step")
    }
    return (replace(objective, **laws) if laws else objective), laws


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
    for path, part in parts(experiment.objective):
        if shares_dropout(part):
            raise ValueError(
                f"run.compile = True, and {experiment.objective_name}.{path} has dropout = "
                "'shared': compiled networks draw the masks of a target in another order than "
                "those of the prediction. Set run.compile = False, or its dropout = 'off'"
            )
    if any(isinstance(part, Derivative) for _, part in parts(experiment.objective)):
        log.warning("run.compile: networks are compiled, derivatives of them are not")
