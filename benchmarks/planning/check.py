"""Compares what the planner predicts with the peak memory of real processes: `make plan-check`.

Each case trains a DiT for a few steps in the processes that torchrun starts, on CPUs, and reads the
resident peak of a step over what was resident before the network was made. Allocations above 64
KiB are given back at once, so that the peak is that of live tensors. The largest process counts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import registry
from backbones.dit import DiT
from backbones.network import FlowNetwork, build_network
from benchmarks.planning.outline import Outline
from benchmarks.planning.simulation import Simulation
from benchmarks.planning.zero_memory import Sizes, StepSplit, largest
from benchmarks.runs.peak_memory import PeakMemory
from registry.protocols import LossOutput, required_heads
from trainers import AdamW, Budget, Callback, TrainState, fit, ranks
from trainers.engines import TrainStep, as_trained
from trainers.zero.engine import ZeroEngine

OBJECTIVES, STAGES = ("flow_matching", "mean_flow", "dumo"), (0, 1, 2, 3)
SHAPE, CLASSES, BATCH, DECAYS = (4, 16, 16), 10, 16, (0.999,)
BUCKET = 4_000_000  # smaller than the network, so that buckets become full
STEPS = 3
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt


@dataclass(frozen=True)
class Noise:
    """Labelled noise, a function of the step: what a training asks of a data set, and no more."""

    name: str = "noise"
    shape: tuple[int, ...] = SHAPE
    num_classes: int = CLASSES

    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        rng = torch.Generator().manual_seed(step)
        return torch.randn(n, *SHAPE, generator=rng), {"label": torch.arange(n) % CLASSES}


class Watch(Callback):
    """The peak of every step after the first, in bytes."""

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        if state.step == 1:
            self._peak = PeakMemory(state.device)

    def on_end(self, state: TrainState) -> None:
        self.bytes = (self._peak.mib or 0.0) * 2**20


def network(keys: Sequence[str], dim: int, depth: int, checkpointing: bool) -> FlowNetwork:
    dit = partial(DiT, dim=dim, depth=depth, num_heads=8, checkpointing=checkpointing)
    return build_network(dit, SHAPE, CLASSES, keys)


def measured(name: str, engine: ZeroEngine, dim: int, depth: int, checkpointing: bool) -> float:
    objective = registry.objectives.get(name)()
    before = (PeakMemory(torch.device("cpu")).mib or 0.0) * 2**20
    watch = Watch()
    fit(
        net=network(required_heads(objective), dim, depth, checkpointing),
        objective=objective,
        dataset=Noise(),
        batch_size=BATCH,
        budget=Budget(steps=STEPS),
        engine=engine,
        optimizer=AdamW(),
        ema_decays=DECAYS,
        callbacks=[watch],
    )
    engine._deepspeed.destroy()
    return ranks.largest(watch.bytes - before)[0]


def predicted(name: str, engine: ZeroEngine, dim: int, depth: int, checkpointing: bool) -> float:
    objective = registry.objectives.get(name)()
    bare = copy.deepcopy(objective)
    with torch.device("meta"):
        net = network(required_heads(objective), dim, depth, checkpointing)
        step = TrainStep(net, as_trained(objective, engine), DECAYS).train()
    outline = Outline(
        arm="", step=step, bare=bare, engine=engine, optimizer=AdamW(), batch_size=BATCH,
        shape=SHAPE, num_classes=CLASSES, shape_from="", images=None,
    )  # fmt: skip
    simulation, rows = Simulation(outline), BATCH // ranks.count()
    parts = engine.gradient_accumulation_steps
    split = StepSplit(gpus=ranks.count(), accumulate=parts, touched=True)
    activity = simulation.activity(rows // parts, rows // parts)
    return largest(Sizes.of(step, simulation.update()), engine, split, activity).total
