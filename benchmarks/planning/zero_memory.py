"""Bytes on one GPU under each ZeRO stage, at the moments of a step where they may be largest.

    backward     what the objective keeps and works with, gathered weights, buckets of gradients
    reduction    gradients in buckets, and the copy of a bucket that is averaged
    update       flattened gradients, the optimizer's workspace

Everything that lasts is float32 in every precision: weights, gradients, optimizer state, averages
and teachers. DeepSpeed is taken as it is in version 0.19. Stages 1 and 2 keep a float32 copy of the
piece of the weights that a process updates. Buckets have their full size on a GPU. Stage 3 keeps
weights gathered that are used again in the same step, up to
zero_engine.stage3_max_live_parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from benchmarks.planning.simulation import Activity, Update
from trainers.engines import TrainStep
from trainers.zero.engine import ZeroEngine

ALWAYS_BUCKET = 500_000_000  # of stage 0, fixed by DeepSpeed
FLOAT = 4
KINDS = (
    *("weights", "gradients", "optimizer", "averages", "teachers"),
    *("activations", "workspace", "buckets", "gathered"),
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of everything that lasts, before any stage divides it."""

    weights: float
    averages: float
    teachers: float
    block: float  # the weights of the largest block, 0 for a network without blocks
    recomputed: bool  # by activation checkpointing, block by block
    update: Update

    @classmethod
    def of(cls, step: TrainStep, update: Update) -> Sizes:
        lists = [m for m in step.net.modules() if isinstance(m, nn.ModuleList)]
        return cls(
            weights=_bytes(step.net),
            averages=_bytes(step.averages),
            teachers=_bytes(step.teachers) + _bytes(step.features),
            block=max((_bytes(block) for blocks in lists for block in blocks), default=0.0),
            recomputed=bool(getattr(step.net.trunk, "fields", {}).get("checkpointing")),
            update=update,
        )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by kind on one GPU at a moment, and what offloading puts on its host."""

    moment: str
    kinds: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True, kw_only=True)
class StepSplit:
    """How a step is divided. With `touched` a buffer counts by what is written, as on a CPU."""

    gpus: int
    accumulate: int
    touched: bool = False


def largest(
    sizes: Sizes, engine: ZeroEngine | None, split: StepSplit, activity: Activity
) -> Memory:
    """The moment of the largest memory. An engine of None stands for plain PyTorch on one GPU."""
    if engine is None or engine.stage == 0:
        found = _whole(sizes, engine is not None, split, activity)
    elif engine.stage < 3:
        found = _pieces(sizes, engine, split, activity)
    else:
        found = _sharded(sizes, engine, split, activity)
    return max(found, key=lambda memory: memory.total)


def _whole(sizes: Sizes, averaged: bool, split: StepSplit, activity: Activity) -> Iterator[Memory]:
    """Nothing is sharded; gradients are made while activations are freed."""
    lasting = {
        "weights": sizes.weights,
        "optimizer": sizes.update.state,
        "averages": sizes.averages,
        "teachers": sizes.teachers,
    }
    whole = {"gradients": sizes.weights}
    for peak, made in activity.moments:
        gradients = whole if split.accumulate > 1 else {"gradients": made}
        yield Memory(moment="backward", kinds=lasting | gradients | _active(activity, peak))
    if averaged:
        bucket = {"buckets": min(sizes.weights, FLOAT * ALWAYS_BUCKET)}
        yield Memory(moment="reduction", kinds=lasting | whole | bucket)
    workspace = {"workspace": sizes.update.workspace}
    yield Memory(moment="update", kinds=lasting | whole | workspace)


def _pieces(
    sizes: Sizes, engine: ZeroEngine, split: StepSplit, activity: Activity
) -> Iterator[Memory]:
    """Stages 1 and 2: weights are whole, and each process has a piece of the rest."""
    piece, away = sizes.weights / split.gpus, engine.offload_optimizer
    state = sizes.update.state / split.gpus + piece
    host = state + 2 * piece if away else 0.0
    lasting = {
        "weights": sizes.weights,
        "optimizer": 0.0 if away else state,
        "averages": sizes.averages,
        "teachers": sizes.teachers,
    }
    before = 0.0  # gradients of the micro-batches that came first
    if split.accumulate > 1:
        before = sizes.weights if engine.stage == 1 else 0.0 if away else piece
    for peak, made in activity.moments:
        own = made / split.gpus if split.touched else piece
        gradients = {"gradients": before + (0.0 if away else own)}
        buckets = {"buckets": _buckets(sizes, engine, split, made)}
        kinds = lasting | gradients | buckets | _active(activity, peak)
        yield Memory(moment="backward", kinds=kinds, host=host)
    gradients = {"gradients": before + (0.0 if away else piece)}
    buckets = {"buckets": _buckets(sizes, engine, split, sizes.weights, last=True)}
    yield Memory(moment="reduction", kinds=lasting | gradients | buckets, host=host)
    if not away:
        workspace = {"workspace": sizes.update.workspace / split.gpus}
        kinds = lasting | {"gradients": 2 * piece} | workspace
        yield Memory(moment="update", kinds=kinds, host=host)


def _sharded(
    sizes: Sizes, engine: ZeroEngine, split: StepSplit, activity: Activity
) -> Iterator[Memory]:
    """Stage 3: everything is in pieces. Layers are gathered for use, and kept if used again."""
    piece, away = sizes.weights / split.gpus, engine.offload_optimizer
    state = sizes.update.state / split.gpus + piece
    host = (state + piece if away else 0.0) + (piece if engine.offload_param else 0.0)
    lasting = {
        "weights": 0.0 if engine.offload_param else piece,
        "gradients": 0.0 if away else piece,
        "optimizer": 0.0 if away else state,
        "averages": sizes.averages / split.gpus,
        "teachers": sizes.teachers / split.gpus,
    }
    gathered = {"gathered": _gathered(sizes, engine)}
    for peak, made in activity.moments:
        buckets = {"buckets": _buckets(sizes, engine, split, made)}
        kinds = lasting | gathered | buckets | _active(activity, peak)
        yield Memory(moment="backward", kinds=kinds, host=host)
    buckets = {"buckets": _buckets(sizes, engine, split, sizes.weights, last=True)}
    yield Memory(moment="reduction", kinds=lasting | buckets, host=host)
    if not away:
        workspace = {"workspace": sizes.update.workspace / split.gpus}
        kinds = lasting | {"gradients": 2 * piece} | buckets | workspace
        yield Memory(moment="update", kinds=kinds, host=host)


def _buckets(
    sizes: Sizes, engine: ZeroEngine, split: StepSplit, made: float, last: bool = False
) -> float:
    """The buckets, and the copy of a bucket that is averaged when it is full or at the end."""
    bucket = FLOAT * engine.reduce_bucket_size
    both = 2 * bucket if engine.overlap_comm and engine.stage < 3 else bucket
    full = made >= bucket if split.touched else sizes.weights > bucket
    copy = min(bucket, sizes.weights) if full or last else 0.0
    return (min(both, made) if split.touched else both) + copy


def _gathered(sizes: Sizes, engine: ZeroEngine) -> float:
    """The gathered weights of stage 3, and the bucket of a prefetch beside them.

    Weights that are used again in the step stay, up to stage3_max_live_parameters. Without
    checkpointing all weights stay that the backward reads, since autograd saved them.
    """
    called = sizes.weights + sizes.teachers
    held = sizes.block if sizes.recomputed else sizes.weights
    prefetch = min(FLOAT * engine.stage3_prefetch_bucket_size + sizes.block, called)
    return max(min(called, FLOAT * engine.stage3_max_live_parameters), held) + prefetch


def _active(activity: Activity, peak: float) -> dict[str, float]:
    kept = min(activity.kept, peak)
    return {"activations": kept, "workspace": peak - kept}


def _bytes(module: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
