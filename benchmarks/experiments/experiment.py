"""One run, as data: everything that it needs, built and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

import registry
from backbones.network import FlowNetwork
from registry.protocols import (
    Dataset,
    Engine,
    Metric,
    Objective,
    Optimizer,
    Pruner,
    Recorder,
    Sampler,
    Schedule,
)
from trainers.budget import Budget
from trainers.loop import Training
from trainers.sharding import shape_of
from zoo.teachers import Frozen


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run needs, built and checked; benchmarks/runs/execute.py runs it."""

    objective: Objective
    dataset: Dataset
    net: FlowNetwork
    teacher: Frozen | None  # a frozen teacher, its network attached but not yet trained or loaded
    sampler: Sampler
    engine: Engine
    optimizer: Optimizer
    teacher_optimizer: Optimizer
    schedule: Schedule
    metric: Metric
    recorder: Recorder
    budget: Budget
    batch_size: int
    seed: int
    ema_decay: tuple[float, ...]
    power_emas: tuple[float, ...]
    ema_snapshots: int
    nfe: tuple[int, ...]
    num_samples: int
    log_every: int
    evaluate_every: int
    checkpoint_seconds: float
    non_finite: str
    pruner: Pruner | None
    device: torch.device
    compile: bool = False
    start_from: str = ""
    start_layout: str = ""
    derivative_error: Mapping[str, float] = field(default_factory=dict)  # by the start-up probe
    as_recorded: bool = False  # a finished run, opened with the sampling that it recorded

    @property
    def training(self) -> Training:
        """Its training, for trainers.fit."""
        return Training(
            net=self.net,
            objective=self.objective,
            dataset=self.dataset,
            batch_size=self.batch_size,
            budget=self.budget,
            engine=self.engine,
            optimizer=self.optimizer,
            schedule=self.schedule,
            ema_decays=self.ema_decay,
            power_emas=self.power_emas,
            compile=self.compile,
            seed=self.seed,
            device=self.device,
        )

    @property
    def distilled(self) -> tuple[Frozen, FlowNetwork] | None:
        """The frozen teacher and its network; None for a run without one."""
        if self.teacher is None or not isinstance(self.teacher.network, FlowNetwork):
            return None
        return self.teacher, self.teacher.network

    @property
    def objective_name(self) -> str:
        return registry.objectives.name_of(self.objective)

    @property
    def backbone_name(self) -> str:
        return registry.backbones.name_of(self.net.trunk)

    @property
    def sampler_name(self) -> str:
        return registry.samplers.name_of(self.sampler)

    @property
    def num_params(self) -> int:
        return sum(math.prod(shape_of(p)) for p in self.net.parameters())
