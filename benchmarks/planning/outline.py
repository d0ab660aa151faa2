"""What a run would train, made from its gin file alone: no data, and networks without memory.

The shape of the data is the one that was asked for. Otherwise it is the data set's own, or, where
the files of the data are not there, that of the macros DATA_SHAPE and DATA_CLASSES of the recipes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import registry
from backbones.network import build_network
from benchmarks.experiments import defaults
from benchmarks.experiments.arguments import bound
from benchmarks.experiments.build import run
from benchmarks.experiments.network_size import at_most_tensors
from benchmarks.grids.request import Request
from registry import gin_setup
from registry.protocols import Engine, Objective, Optimizer, parts, required_heads
from trainers.engines import TrainStep
from zoo.teachers import Frozen


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A run before it has data or memory: its TrainStep is on the meta device."""

    arm: str
    step: TrainStep
    bare: Objective  # the same, before its teachers have networks
    engine: Engine
    optimizer: Optimizer
    batch_size: int
    shape: tuple[int, ...]
    num_classes: int
    shape_from: str
    images: int | None  # of the whole run, where its budget is in steps or images

    @property
    def objective(self) -> str:
        return registry.objectives.name_of(self.step.objective)

    @property
    def backbone(self) -> str:
        return registry.backbones.name_of(self.step.net.trunk)

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.step.net.parameters())


def outline(
    request: Request, arm: str = "", shape: Sequence[int] = (), num_classes: int | None = None
) -> Outline:
    """One arm's run; ValueError for what is not bound, or where nothing tells the data's shape.

    A file in the folder of a run may have values that are refused today; they are warned of.
    """
    request.parse(recorded=request.of_a_run)
    if missing := [f"{key} = ''" for key in gin_setup.required(arm)]:  # paths, not needed here
        request.parse(missing, recorded=request.of_a_run)
    with gin_setup.arm(arm):
        objective = bound("objective", _value("objective", arm), registry.objectives)
        data = _data(arm, tuple(shape), num_classes)
        batch_size, steps, images = (_value(n, arm) for n in ("batch_size", "steps", "images"))
        return Outline(
            arm=arm,
            bare=copy.deepcopy(objective),
            step=_train_step(objective, arm, data[0], data[1]),
            engine=_value("engine", arm) or defaults.engine(),
            optimizer=_value("optimizer", arm) or defaults.optimizer(),
            batch_size=batch_size,
            shape=data[0],
            num_classes=data[1],
            shape_from=data[2],
            images=images or (steps and steps * batch_size),
        )


def _value(name: str, arm: str) -> Any:
    """What `run.NAME` is bound to in the arm, built, or its default."""
    if (built := gin_setup.build(f"run.{name}", arm)) is not None:
        return built
    return inspect.signature(run).parameters[name].default


def _data(arm: str, shape: tuple[int, ...], num_classes: int | None) -> tuple[Any, int, str]:
    if shape and num_classes is not None:
        return shape, num_classes, "as asked"
    stated, classes = (gin_setup.query(f"DATA_{m}/gin.macro.value") for m in ("SHAPE", "CLASSES"))
    problem: Exception | None = None
    try:
        dataset = bound("dataset", _value("dataset", arm), registry.datasets)
        found = (dataset.shape, dataset.num_classes, "of the data")
    except (OSError, ValueError, TypeError) as error:
        found, problem = (stated, classes or 0, "by DATA_SHAPE; the data are not here"), error
    if shape:
        found = (shape, found[1], "as asked")
    if num_classes is not None:
        found = (found[0], num_classes, found[2])
    if found[0] is None:
        raise ValueError(
            f"the shape of the data is not known: {problem}\nGive it, such as --shape 4 32 32 "
            "--classes 1000, or let the file set DATA_SHAPE = (4, 32, 32) and DATA_CLASSES = 1000"
        ) from problem
    return found


def _train_step(objective: Objective, arm: str, shape: Any, num_classes: int) -> TrainStep:
    backbone = bound("backbone", _value("backbone", arm), registry.backbones)
    decays, widths = _value("ema_decay", arm), _value("power_emas", arm)
    with torch.device("meta"), at_most_tensors():
        for _, part in parts(objective):
            if isinstance(part, Frozen):
                part.attach(build_network(backbone, shape, num_classes, ("v",)))
        keys, heads = required_heads(objective), _value("heads", arm)
        net = build_network(backbone, shape, num_classes, keys, heads)
        step = TrainStep(
            net, objective, decays if isinstance(decays, Sequence) else (decays,), tuple(widths)
        )
    return step.train()
