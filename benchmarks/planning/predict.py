"""`objective-zoo plan FILE --gpus N --memory 80GB`: does it fit, with which micro-batch, how long.

Nothing trains and no data are read. outline.py makes the run on the meta device, simulation.py
measures its loss and backward on tensors without data, zero_memory.py divides lasting memory as
the ZeRO stage does. The global batch is kept: it is cut into `accumulate` micro-batches, each as
large as fits. check.py compares the sums with the memory of real processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

import registry
from benchmarks.grids.request import Request
from benchmarks.planning.outline import outline
from benchmarks.planning.simulation import Simulation, mean_over_steps
from benchmarks.planning.zero_memory import Memory, Sizes, StepSplit, largest
from registry.protocols import runs_in_several_processes
from trainers.engines import as_trained
from trainers.zero.engine import ZeroEngine

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SMALL_BUCKETS = {
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 10_000_000,
    "stage3_max_live_parameters": 0,
}
SECONDS_A_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Equal GPUs, and how fast they are where that is known."""

    gpus: int
    memory: float  # bytes of each
    tflops: float = 0.0  # reached by each, in 10^12 operations a second
    images_per_second: float = 0.0  # of all GPUs together
    host: bool = False  # processes on a CPU, where memory counts once it is written

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"--gpus {self.gpus} must be 1 or more")
        for name in ("tflops", "images_per_second"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        if self.tflops and self.images_per_second:
            raise ValueError("--tflops and --images-per-second exclude each other; give one")


@dataclass(frozen=True, kw_only=True)
class StageFit:
    """One ZeRO stage with the largest micro-batch that fits, or one row if nothing fits."""

    stage: int | None  # None is plain PyTorch
    fits: bool
    micro_batch: int
    accumulate: int
    memory: Memory
    deepspeed: int | None  # DeepSpeed's own estimate of the states, for 16-bit weights
    remedy: str = ""  # bindings with which it would fit


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one arm's run takes on a machine."""

    arm: str
    objective: str
    backbone: str
    parameters: int
    batch_size: int
    precision: str
    shape: tuple[int, ...]
    shape_from: str
    images: int | None
    flops_per_image: float
    images_per_second: float
    fits: tuple[StageFit, ...]

    @property
    def images_per_day(self) -> float:
        return self.images_per_second * SECONDS_A_DAY

    @property
    def days(self) -> float | None:
        return self.images / self.images_per_day if self.images and self.images_per_day else None

    def json(self) -> dict[str, Any]:
        fits = [
            {**vars(f), "memory": {**vars(f.memory), "total": f.memory.total}} for f in self.fits
        ]
        return {
            **vars(self),
            "images_per_day": self.images_per_day,
            "days": self.days,
            "fits": fits,
        }


def predict(
    request: Request,
    machine: Machine,
    stages: Sequence[int] = (0, 1, 2, 3),
    shape: Sequence[int] = (),
    num_classes: int | None = None,
) -> list[Prediction]:
    """A prediction for each arm that the request would run."""
    data = {"shape": shape, "num_classes": num_classes}
    return [_Case(request, arm, machine, data).prediction(stages) for arm in request.arms()]


def read_memory(text: str) -> float:
    """'80GB' or '79.2GiB' in bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not found or found[2].upper() not in UNITS or not float(found[1]) > 0:
        raise ValueError(
            f"--memory {text!r} is no size; write a number and a unit, such as 80GB or 79.2GiB"
        )
    return float(found[1]) * UNITS[found[2].upper()]


class _Case:
    """One arm on one machine."""

    def __init__(self, request: Request, arm: str, machine: Machine, data: Mapping[str, Any]):
        self._request, self._arm, self._data = request, arm, data
        self._machine, self._outline = machine, outline(request, arm, **data)
        if self._outline.batch_size % (machine.gpus * self._group):
            of = f" in groups of {self._group} rows" if self._group > 1 else ""
            raise ValueError(
                f"a batch of {self._outline.batch_size} cannot be shared out equally to "
                f"{machine.gpus} GPUs{of}; bind run.batch_size to a multiple of "
                f"{machine.gpus * self._group}"
            )
        self._rows = self._outline.batch_size // machine.gpus
        self._simulation = Simulation(self._outline)
        self._sizes = Sizes.of(self._outline.step, self._simulation.update())

    @property
    def _group(self) -> int:
        return self._outline.step.group

    @cached_property
    def _sharded(self) -> Simulation:
        """At stage 3, where an objective may differentiate otherwise."""
        objective, engine = self._outline.step.objective, self._at(3, {})
        if as_trained(objective, engine) is objective:
            return self._simulation
        made = outline(self._request, self._arm, **self._data)
        made.step.objective = as_trained(made.step.objective, engine)
        return Simulation(made)

    def _simulated(self, stage: int | None) -> Simulation:
        return self._sharded if stage == 3 else self._simulation

    @cached_property
    def _engine(self) -> ZeroEngine:
        """The file's own ZeroEngine, or the one of trainer/zero2.gin, in the file's precision.

        The type is tested here, since the plan is made of this engine's own stages and buckets.
        """
        engine = self._outline.engine
        if isinstance(engine, ZeroEngine):
            return engine
        precision = getattr(engine, "precision", "fp32")
        return registry.engines.build("zero_engine", precision=precision)

    def prediction(self, stages: Sequence[int]) -> Prediction:
        made = self._outline
        fits = [self._best(stage) for stage in stages]
        if self._machine.gpus == 1 and not runs_in_several_processes(made.engine):
            fits.insert(0, self._best(None))
        fits = [fit if fit.fits else replace(fit, remedy=self._remedy(fit.stage)) for fit in fits]
        run = self._simulated(fits[0].stage)
        flops = run.activity(self._rows, self._rows).flops / self._rows
        bare = as_trained(made.bare, self._at(3, {})) if run is self._sharded else made.bare
        flops *= mean_over_steps(bare, made.shape, made.num_classes > 0)
        speed = self._machine.images_per_second
        if self._machine.tflops:
            speed = self._machine.gpus * self._machine.tflops * 1e12 / flops
        return Prediction(
            arm=made.arm,
            objective=made.objective,
            backbone=made.backbone,
            parameters=made.num_params,
            batch_size=made.batch_size,
            precision=self._engine.precision,
            shape=made.shape,
            shape_from=made.shape_from,
            images=made.images,
            flops_per_image=flops,
            images_per_second=speed,
            fits=tuple(fits),
        )

    def _best(self, stage: int | None, **changes: Any) -> StageFit:
        """The stage with the largest micro-batch that fits, else with one row, or one group."""
        micros = [m for m in range(self._rows, 0, -self._group) if self._rows % m == 0]
        for micro in micros:
            memory = self._memory(stage, micro, changes)
            if fits := memory.total <= self._machine.memory:
                break
        return StageFit(
            stage=stage,
            fits=fits,
            micro_batch=micro,
            accumulate=self._rows // micro,
            memory=memory,
            deepspeed=self._estimate(stage),
        )

    def _memory(self, stage: int | None, micro: int, changes: Mapping[str, Any]) -> Memory:
        engine = None if stage is None else self._at(stage, changes)
        split = StepSplit(
            gpus=self._machine.gpus,
            accumulate=self._rows // micro,
            touched=self._machine.host,
        )
        activity = self._simulated(stage).activity(micro, self._rows)
        return largest(self._sizes, engine, split, activity)

    def _at(self, stage: int, changes: Mapping[str, Any]) -> ZeroEngine:
        """The engine at another stage, without the offloading that this stage does not have."""
        own = {
            "offload_optimizer": self._engine.offload_optimizer and stage > 0,
            "offload_param": self._engine.offload_param and stage == 3,
        }
        return replace(self._engine, stage=stage, **{**own, **changes})

    def _remedy(self, stage: int | None) -> str:
        """The first of these that fits, as bindings: a higher stage, smaller buckets, offloading,
        each without and then with activation checkpointing."""
        small = {name: min(n, getattr(self._engine, name)) for name, n in SMALL_BUCKETS.items()}
        first = 0 if stage is None else stage
        tries: list[tuple[int, dict[str, Any]]] = [(s, {}) for s in range(first + 1, 4)]
        tries += [(s, small) for s in range(max(first, 1), 4)]
        tries.append((3, small | {"offload_optimizer": True}))
        for case, network in self._networks():
            for at, changes in tries:
                fit = case._best(at, **changes)
                if fit.fits:
                    bindings = {"stage": at, **changes}
                    words = [f"zero_engine.{key} = {value}" for key, value in bindings.items()]
                    return f"{', '.join([*words, *network])}: micro-batch {fit.micro_batch}"
        return "more memory, more GPUs or a smaller network"

    def _networks(self) -> Iterator[tuple[_Case, list[str]]]:
        """This case, and the same with activation checkpointing where the network has it."""
        yield self, []
        if getattr(self._outline.step.net.trunk, "fields", {}).get("checkpointing") is False:
            binding = f"{self._outline.backbone}.checkpointing = True"
            bindings = (*self._request.bindings, f"{self._arm}/{binding}".lstrip("/"))
            request = replace(self._request, bindings=bindings)
            yield _Case(request, self._arm, self._machine, self._data), [binding]

    def _estimate(self, stage: int | None) -> int | None:
        """DeepSpeed's own estimate, for all GPUs of the machine in one node."""
        if stage not in (2, 3):
            return None
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it found none
        from deepspeed.runtime.zero import stage3, stage_1_and_2

        weights, gpus = self._outline.num_params, self._machine.gpus
        if stage == 2:
            found = stage_1_and_2.estimate_zero2_model_states_mem_needs(
                weights, num_gpus_per_node=gpus, cpu_offload=False
            )
            return int(found[1])
        layer = int(self._sizes.block // 4)
        return int(
            stage3.estimate_zero3_model_states_mem_needs(
                weights, layer, num_gpus_per_node=gpus, cpu_offload=False, cpu_offload_params=False
            )[1]
        )
