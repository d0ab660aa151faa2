"""Compares what the planner predicts with the peak memory of real processes: `make plan-check`.

Each case trains a DiT for a few steps in the processes that torchrun starts, on CPUs, and reads the
resident peak of a step over what was resident before the network was made. Allocations above 64
KiB are given back at once, so that the peak is that of live tensors. The largest process counts.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import registry
from backbones.dit import DiT
from backbones.network import FlowNetwork, build_network
from benchmarks.markdown import markdown
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
    """Labelled noise, a function of the step."""

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
        dataset=Noise(),  # it has all that a training asks of a data set
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--checkpointing", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--dim", type=int, default=448)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument(
        "--bound", type=float, default=0.15, help="largest relative error that passes"
    )
    arguments = parser.parse_args()
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 2**16)
    libc.mallopt(TRIM_THRESHOLD, 0)
    ranks.join()
    rows, worst = [], 0.0
    cases = list(itertools.product(arguments.objectives, arguments.checkpointing, arguments.stages))
    for stage in arguments.stages:  # the first run at a stage loads libraries
        measured(arguments.objectives[0], ZeroEngine(stage=stage), 64, 1, False)
    for name, checkpointing, stage in cases:
        engine = ZeroEngine(
            stage=stage, reduce_bucket_size=BUCKET, gradient_accumulation_steps=arguments.accumulate
        )
        network = (arguments.dim, arguments.depth, bool(checkpointing))
        found = measured(name, engine, *network)
        planned = predicted(name, engine, *network) if ranks.leads() else found
        worst = max(worst, abs(planned / found - 1))
        sizes = [f"{planned / 1e6:.0f} MB", f"{found / 1e6:.0f} MB", f"{planned / found - 1:+.1%}"]
        rows.append([name, "on" if checkpointing else "off", str(stage), *sizes])
        del engine
        gc.collect()
        if ranks.leads():
            print(*rows[-1], flush=True)
    if ranks.leads():
        header = ["objective", "checkpointing", "stage", "predicted", "measured", "error"]
        print(f"\n{markdown(header, rows)}\n\nlargest error {worst:.1%}", flush=True)
    ranks.gathered(None)
    os._exit(worst > arguments.bound)  # DeepSpeed's threads may abort a process that ends by itself


if __name__ == "__main__":
    main()
