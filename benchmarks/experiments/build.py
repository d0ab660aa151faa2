"""One run, as data: `run()` takes everything from gin and returns it built and checked.

`run` is the only gin.configurable of the project. It builds the network, compares the objective's
derivative on it with another method and asks for one loss on a few rows, so that whatever does not
fit together is said before any training.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gin
import torch
from torch import Tensor

import registry
from backbones.network import FlowNetwork, build_network
from benchmarks.experiments.arguments import bound, check_counts, decays, one_budget, power_widths
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.guidance_checks import check_guidance
from benchmarks.experiments.pruning import Pruner
from benchmarks.metrics import evaluate
from benchmarks.metrics.feature_metrics import FeatureMetrics
from benchmarks.metrics.features import Pixels
from registry.gin_errors import said
from registry.protocols import (
    Batch,
    Cond,
    Dataset,
    Derivative,
    Engine,
    LossOutput,
    Metric,
    Objective,
    Optimizer,
    Sampler,
    Schedule,
    parts,
    required_heads,
)
from trainers import ranks
from trainers.derivative_probe import probe_derivatives
from trainers.devices import device_of
from trainers.engines import TrainStep
from trainers.rng import generator
from trainers.zero.engine import ZeroEngine
from zoo.derivatives.one_pass import apart
from zoo.samplers import check_sampler, valid_samplers
from zoo.teachers import Frozen

PROBE_ROWS = 4

log = logging.getLogger(__name__)


@gin.configurable("run")
def run(
    *,
    objective: Objective | None = None,
    backbone: type | None = None,
    dataset: Dataset | None = None,
    heads: Sequence[type] | None = None,
    sampler: Sampler | None = None,
    engine: Engine | None = None,
    optimizer: Optimizer | None = None,
    teacher_optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    metric: Metric | None = None,
    recorder: Any = None,
    steps: int | None = None,
    images: int | None = None,
    seconds: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
    ema_decay: float | Sequence[float] = 0.999,
    power_emas: float | Sequence[float] = (),
    ema_snapshots: int = 0,
    nfe: Sequence[int] = (1, 2, 4, 8),
    num_samples: int = 1000,
    log_every: int = 50,
    evaluate_every: int = 0,
    checkpoint_seconds: float = 600.0,
    non_finite: str = "stop",
    pruner: Pruner | None = None,
    compile: bool = False,
    start_from: str = "",
    start_layout: str = "",
    device: str = "auto",
) -> Experiment:
    """Build and check one run; ValueError for anything that does not fit together.

    The budget is one of `steps`, `images` and `seconds` of training. Samples are drawn with the
    average of the weights at `ema_decay`, the first of several, at each of `nfe` network calls. A
    teacher that is trained first takes `teacher_optimizer`, by default the run's own. `start_from`
    is an exported folder or a public checkpoint of `start_layout` that the network starts as.
    Averages of the relative widths `power_emas` are stored `ema_snapshots` times over the budget,
    for `objective-zoo ema` to make one of any width from.
    `compile` trains the network, and evaluates its teachers, by torch.compile.
    """
    check_counts(
        nfe,
        batch_size=batch_size,
        num_samples=num_samples,
        log_every=log_every,
        evaluate_every=evaluate_every,
    )
    objective = bound("objective", objective, registry.objectives)
    backbone = bound("backbone", backbone, registry.backbones)
    dataset = bound("dataset", dataset, registry.datasets)
    name = registry.objectives.name_of(objective)
    if sampler is None:
        valid = valid_samplers(objective)
        if not valid:
            raise ValueError(f"no registered sampler reads the outputs of objective {name!r}")
        sampler = registry.samplers.build(valid[0])
    check_sampler(name, objective, sampler)
    evaluate.samplers_for(sampler, nfe)

    def network(keys: Sequence[str], chosen: Sequence[type] | None) -> FlowNetwork:
        # Seeded for each network: what two of them share starts from the same weights.
        torch.manual_seed(seed)
        made = build_network(backbone, dataset.shape, dataset.num_classes, keys, chosen)
        return made.to(_device(device))

    net = network(required_heads(objective), heads)
    check_guidance(name, objective, sampler, net, dataset.num_classes)
    optimizer = optimizer or registry.optimizers.build("adamw")
    teacher = _frozen_teacher(objective)
    if teacher is not None:
        teacher.attach(network(("v",), None))
    engine = engine or registry.engines.build("torch_engine")
    experiment = Experiment(
        objective=_followed(objective, engine, compile),
        dataset=dataset,
        net=net,
        teacher=teacher,
        sampler=sampler,
        engine=engine,
        optimizer=optimizer,
        teacher_optimizer=teacher_optimizer or optimizer,
        schedule=schedule or registry.schedules.build("cosine"),
        metric=metric or _default_metric(dataset),
        recorder=recorder or registry.recorders.build("mlflow"),
        budget=one_budget(steps=steps, images=images, seconds=seconds),
        batch_size=batch_size,
        seed=seed,
        ema_decay=decays(ema_decay),
        power_emas=power_widths(power_emas, ema_snapshots),
        ema_snapshots=ema_snapshots,
        nfe=tuple(nfe),
        num_samples=num_samples,
        log_every=log_every,
        evaluate_every=evaluate_every,
        checkpoint_seconds=checkpoint_seconds,
        non_finite=non_finite,
        pruner=pruner,
        device=_device(device),
        compile=compile,
        start_from=start_from,
        start_layout=start_layout,
    )
    experiment = replace(experiment, derivative_error=_probe(experiment))
    if compile:
        _check_compile(experiment)
    return experiment


def _frozen_teacher(objective: Objective) -> Frozen | None:
    found = [part for _, part in parts(objective) if isinstance(part, Frozen)]
    for teacher in found:
        if not (teacher.checkpoint or teacher.pretrain):
            raise ValueError(
                "the frozen teacher has no network: bind frozen.checkpoint to the folder of a "
                "finished flow-matching run, or frozen.pretrain to a share of the budget, 0.5 say"
            )
    return found[0] if found else None


def _default_metric(dataset: Dataset) -> Metric:
    if len(dataset.shape) == 1:
        return FeatureMetrics(extractor=Pixels(), metrics=(registry.metrics.build("mmd"),))
    return registry.metrics.build("feature_metrics")


def _followed(objective: Objective, engine: Engine, compile: bool) -> Objective:
    """With derivatives that this engine and the compiler can follow."""
    sharded = isinstance(engine, ZeroEngine) and engine.stage == 3
    if not (sharded or compile) or (changed := apart(objective)) is objective:
        return objective
    where = "run.compile = True" if compile else "zero_engine.stage = 3"
    log.warning("%s: derivatives take a pass of their own, @dual() for @one_pass()", where)
    return changed


def _check_compile(experiment: Experiment) -> None:
    """ValueError where it cannot work, and a word on what is left out."""
    if isinstance(experiment.engine, ZeroEngine) and experiment.engine.stage == 3:
        raise ValueError(
            "run.compile = True cannot follow weights that zero_engine.stage = 3 gathers layer by "
            "layer. Set zero_engine.stage = 2 or run.compile = False"
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"run.compile = True needs a C++ compiler, and there is no {compiler!r}. Install g++, "
            "name another one in the variable CXX, or set run.compile = False"
        )
    if any(isinstance(part, Derivative) for _, part in parts(experiment.objective)):
        log.warning("run.compile: networks are compiled, derivatives of them are not")


def _device(name: str) -> torch.device:
    if name == "auto":
        cuda = f"cuda:{ranks.local_number()}" if ranks.launched() else "cuda"
        return torch.device(cuda if torch.cuda.is_available() else "cpu")
    return device_of(name, "run.device")


def _probe(experiment: Experiment) -> dict[str, float]:
    """The derivative's error, then one loss, on a few rows outside the run's own random streams."""
    dataset, seed = experiment.dataset, experiment.seed
    x0, cond = dataset.reference(PROBE_ROWS, seed)
    step = TrainStep(experiment.net, experiment.objective)
    where = f"objective {experiment.objective_name!r} on {PROBE_ROWS} rows of {dataset.name}"
    try:
        derivative_error = _derivative_error(experiment, x0, cond)
        with torch.no_grad():
            out = step(Batch(x0=x0, cond=cond), generator(seed, 0, 0))
    except Exception as error:
        raise ValueError(f"{where}: {said(error)}") from error
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
        cond and {name: value.to(device) for name, value in cond.items()},
        experiment.engine.autocast(device),
    )
