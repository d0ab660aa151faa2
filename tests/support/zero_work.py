"""What the processes of tests do: `python zero_work.py NAME FOLDER`, from `spawn`.

The leading process saves what it found to FOLDER/found.pt.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from zero_toys import Pictures, Sgd, Watch, names, network, objective

import zoo  # noqa: F401  registers the objectives
from registry.protocols import Batch, LossOutput, required_heads
from trainers import (
    AdamW,
    Budget,
    Callback,
    CheckpointCallback,
    TrainState,
    fit,
    ranks,
)
from trainers.checkpoints.checkpoint import checkpoints
from trainers.finite import POLICIES, NonFiniteLoss, StopOnNonFinite
from trainers.sharding import gathered_state, is_sharded, whole
from trainers.zero import engine as zero_module
from trainers.zero import loss_scale
from trainers.zero.engine import ZeroEngine
from zoo.objectives.mean_flow import MeanFlow

STAGES = (0, 1, 2, 3)
DIFFERENT = (0, 2, 3)  # in stage 1 gradients and weights lie as in stage 2
DECAYS = (0.5, 0.9)
# Nothing is kept resident in stage 3.
SMALL = {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}


# What depends on other rows of the batch: of the whole one, or of a group.
WHOLE_BATCH = ("plug_in", "in_fours")


def train(name: str, engine: Any, **changes: Any) -> tuple[TrainState, Watch]:
    watch, made = Watch(), objective(name)
    arguments: dict[str, Any] = {
        "net": network(required_heads(made)),
        "objective": made,
        "dataset": Pictures(),
        "batch_size": 8,
        "budget": Budget(steps=2),
        "optimizer": Sgd(),
        "ema_decays": DECAYS,
        "engine": engine,
    }
    arguments |= changes
    arguments["callbacks"] = [*arguments.get("callbacks", ()), watch]
    return fit(**arguments), watch


def found(state: TrainState, watch: Watch) -> dict[str, Any]:
    """What a run came to, whole, in the leading process."""
    x, t = torch.ones(2, *Pictures().shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        sampled = state.ema_net(x, t, t / 2, None)
    return {
        "losses": watch.losses,
        "norms": watch.norms,
        "scales": watch.scales,
        "net": gathered_state(state.net),
        "module": gathered_state(state.engine.module),  # type: ignore[attr-defined]
        "sampled": next(iter(sampled.values())),
    }


def parity(folder: Path) -> dict[Any, Any]:
    """The cases of PARITY; bf16, fp16, accumulation and offload once."""
    results: dict[Any, Any] = {("gradients", how): _gradients(how) for how in GRADIENTS}
    for key, options in OPTIONS.items():
        results[key] = found(*train("mean_flow", ZeroEngine(max_grad_norm=1.0, **options)))
    results["no rule"] = list(_without_the_rule())
    for stage in DIFFERENT:
        for policy in POLICIES:
            results["bad gradient", stage, policy] = _bad_gradient(stage, policy)
    return results | {case: _parity(*case) for case in PARITY}


def _parity(stage: int, name: str) -> dict[str, Any]:
    state, watch = train(name, ZeroEngine(stage=stage, max_grad_norm=1.0, **SMALL))
    return found(state, watch) | {"same": _same_everywhere(state, watch)}


def parity_too(folder: Path) -> dict[Any, Any]:
    """Stage 3 with every other objective."""
    return {case: _parity(*case) for case in PARITY_TOO}


# Stage 3 alone changes what a loss is computed from, and takes six times as long as the others,
# which differ in where teachers lie. By default it gets each kind of derivative and of teacher.
PARITY = [
    *((stage, "mean_flow") for stage in (0, 1)),
    *((2, name) for name in (*names(), *WHOLE_BATCH)),
    *((3, name) for name in ("mean_flow", "dumo", "dumo_exact", "decm_distilled", "shortcut")),
]
PARITY_TOO = [(3, name) for name in names() if (3, name) not in PARITY]


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"stage": 3, "precision": "bf16", **SMALL},
    "fp16": {"stage": 2, "precision": "fp16"},
    "accumulate": {"stage": 3, "gradient_accumulation_steps": 2, **SMALL},
    "offload": {"stage": 3, "offload_optimizer": True, "offload_param": True, **SMALL},
    "offload 2": {"stage": 2, "offload_optimizer": True, "overlap_comm": False},
}


@dataclass(frozen=True, kw_only=True)
class BadGradient(MeanFlow):
    """The loss is fine, its gradient is not, in one row of the second step."""

    def loss(self, net: nn.Module, batch: Batch, rng: torch.Generator) -> LossOutput:
        out = super().loss(net, batch, rng)
        bad = torch.zeros(len(batch))
        bad[5] = float("nan") if batch.step == 1 else 0.0
        if out.per_sample.requires_grad:
            out.per_sample.register_hook(lambda gradient: gradient + batch.share.rows(bad)[0])
        return out


def _bad_gradient(stage: int, policy: str) -> dict[str, Any]:
    """What each process comes to, and what one is told."""
    watch, engine = Watch(), ZeroEngine(stage=stage, max_grad_norm=1.0, **SMALL)
    told = ""
    try:
        train(
            "mean_flow", engine, objective=BadGradient(), budget=Budget(steps=3),
            callbacks=[StopOnNonFinite(policy=policy), watch],
        )  # fmt: skip
    except NonFiniteLoss as error:
        told = str(error)
    weights = gathered_state(engine.module.net)
    return {
        "told": ranks.gathered(told),
        "losses": ranks.gathered(watch.losses),
        "finite": all(bool(value.isfinite().all()) for value in weights.values()),
    }


def _same_everywhere(state: TrainState, watch: Watch) -> dict[str, bool]:
    """Weights are the same in every process although each had other rows."""
    whole = [p for p in state.engine.module.parameters() if not is_sharded(p)]  # type: ignore[attr-defined]
    sums = ranks.gathered([float(p.detach().double().sum()) for p in whole])
    resident = [p for p in state.net.parameters() if is_sharded(p) and p.data.numel()]
    return {"weights": all(s == sums[0] for s in sums), "released": not resident}


def _without_the_rule() -> Iterator[str]:
    """What is said where the forward-mode rule is missing: refused, or differences."""
    kept, zero_module.allow_forward_mode = zero_module.allow_forward_mode, lambda module: None
    try:
        for choice in ("refuse", "finite_difference"):
            try:
                state, watch = train(
                    "mean_flow", ZeroEngine(stage=3, without_exact=choice, **SMALL)
                )
                yield repr(state.engine.module.objective.derivative)  # type: ignore[attr-defined]
                yield str(watch.losses)
            except ValueError as error:
                yield str(error)
    finally:
        zero_module.allow_forward_mode = kept


@dataclass(kw_only=True, eq=False)
class Unwrapped(ZeroEngine):
    """Calls the module itself, past DeepSpeed."""

    def __call__(self, batch: Batch, rng: torch.Generator) -> LossOutput:
        per_sample = self.module(batch, rng)
        return replace(self._out, per_sample=per_sample)


@dataclass(kw_only=True, eq=False)
class Unreduced(Unwrapped):
    """And its backward."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()


@contextmanager
def own_rows_only() -> Iterator[None]:
    """Whoever sums gradients over the processes gets his own, as large as the sum would be."""
    from deepspeed import comm
    from deepspeed.runtime.comm import coalesced_collectives

    def own(tensor: Tensor, *rest: Any, **options: Any) -> None:
        tensor.mul_(ranks.count())

    def own_chunk(buffer: Tensor, chunk: Tensor, **options: Any) -> None:
        chunk.mul_(ranks.count())

    with (
        patch.object(comm, "all_reduce", own),
        patch.object(comm, "reduce", own),
        patch.object(coalesced_collectives, "_torch_reduce_scatter_fn", own_chunk),
    ):
        yield


GRADIENTS = (
    *("stage 0", "stage 1", "stage 2", "stage 3"),
    *("stage 0, own rows", "stage 2, own rows", "stage 3, own rows"),
    *("stage 0, unreduced", "stage 3, unwrapped"),
)


def _gradients(how: str) -> dict[str, Any]:
    """All gradients, from one step of descent, and those that differ between the processes."""
    stage = int(how[6])
    made = {"unreduced": Unreduced, "unwrapped": Unwrapped}.get(how[9:], ZeroEngine)
    engine = made(stage=stage, gradient_accumulation_steps=2 if stage == 3 else 1, **SMALL)
    with own_rows_only() if how.endswith("own rows") else nullcontext():
        state, _ = train("mean_flow", engine, optimizer=Sgd(lr=1.0), budget=Budget(steps=1))
    return {
        "gradients": moved(state, "mean_flow"),
        "differ": [
            name
            for name, p in state.net.named_parameters()
            if len({value.numpy().tobytes() for value in ranks.gathered(whole(p))}) > 1
        ],
    }


def moved(state: TrainState, name: str) -> dict[str, Tensor]:
    """By how much each weight was lowered."""
    before = network(required_heads(objective(name))).state_dict()
    return {key: before[key] - after for key, after in gathered_state(state.net).items()}


def _resumed(
    name: str, stage: int, where: Path, other: int | None = None, **options: Any
) -> dict[str, Any]:
    """A whole run, and what became of it after its second step, at this stage and another one."""
    told: dict[str, Any] = {}
    told["whole"] = found(
        *go(name, stage, where, CheckpointCallback(every=SAVED, keep=9), **options)
    )
    _lose(where)
    told["same"] = found(*go(name, stage, where, resume=True, **options))
    if other is not None:
        told["other"] = found(*go(name, other, where, resume=True))
    return told


def _lose(where: Path) -> None:
    """As a process that was killed before it saved again."""
    if ranks.leads():
        for path in checkpoints(where / "checkpoints")[1:]:
            shutil.rmtree(path)
    ranks.gathered(None)


def go(
    name: str, stage: int, where: Path, *more: Callback, resume: bool = False, **options: Any
) -> tuple[TrainState, Watch]:
    return train(
        name, ZeroEngine(stage=stage, **SMALL, **options), optimizer=AdamW(lr=1e-2),
        budget=Budget(steps=STEPS), folder=where, callbacks=more, resume=resume,
    )  # fmt: skip


SAVED, STEPS = 2, 5  # DE-CM's third loss, of every third step, comes before and after
CROSSING = ("dumo", "decm")  # an average as teacher, and counters
RESUMED = [*((stage, "dumo") for stage in STAGES), (2, "decm"), (3, "decm_distilled")]
RESUMED_TOO = [
    (stage, name)
    for stage in STAGES
    for name in (names() if stage >= 2 else CROSSING)
    if (stage, name) not in RESUMED
]


def resume(folder: Path) -> dict[Any, Any]:
    """Objectives with teachers and counters stopped and resumed in two processes; one in fp16."""
    half = {}
    with patch.multiple(loss_scale, FIRST_SCALE=2.0**14, SCALE_EVERY=2):
        for stage in (2, 3):
            half[stage, "fp16"] = _resumed("dumo", stage, folder / f"fp16{stage}", precision="fp16")
    return half | {
        (stage, name): _resumed(
            name,
            stage,
            folder / f"{name}{stage}",
            other=(stage + 1) % 4 if name == "dumo" else None,
        )
        for stage, name in RESUMED
    }


def resume_too(folder: Path) -> dict[Any, Any]:
    """The same with every other objective."""
    return {
        (stage, name): _resumed(name, stage, folder / f"{name}{stage}")
        for stage, name in RESUMED_TOO
    }


def save(folder: Path) -> dict[Any, Any]:
    """Whole runs, of which the checkpoint of their second step is left."""
    whole = {}
    for stage in STAGES:
        for name in CROSSING:
            where = folder / f"{name}{stage}"
            saving = CheckpointCallback(every=SAVED, keep=9)
            whole[stage, name] = go(name, stage, where, saving)[1].losses
            _lose(where)
    return whole


OTHER = {0: 3, 1: 2, 2: 3, 3: 2}


def go_on(folder: Path) -> dict[Any, Any]:
    """The losses after the second step, at the stage that it was saved at and at another one."""
    return {
        (stage, name, other): go(name, other, folder / f"{name}{stage}", resume=True)[1].losses
        for stage in STAGES
        for name in CROSSING
        for other in (stage, OTHER[stage])
    }


def four(folder: Path) -> dict[Any, Any]:
    """Every objective, in batches whose quotas are no multiples of four."""
    return {
        (stage, name): found(
            *train(name, ZeroEngine(stage=stage, max_grad_norm=1.0, **SMALL), batch_size=12)
        )
        for stage, name in FOUR
    }


FOUR = [
    (stage, name)
    for stage in STAGES
    for name in (*names(), "one_row")
    if stage >= 2 or name in ("mean_flow", "shortcut")
]


def spawn(
    count: int, name: str, folder: Path, timeout: float = 500.0, file: str = __file__
) -> dict[Any, Any]:
    """Run a function of a file that calls `main` in `count` processes; what the leader found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["OMP_NUM_THREADS"] = "1"
    started = [
        subprocess.Popen(
            [sys.executable, file, name, str(folder)],
            env={**os.environ, **shared, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.DEVNULL, stderr=open(folder / f"rank{i}.log", "wb"),
        )
        for i in range(count)
    ]  # fmt: skip
    try:
        for i, process in enumerate(started):
            if process.wait(timeout):
                raise AssertionError((folder / f"rank{i}.log").read_text()[-4000:])
    finally:
        for process in started:
            process.kill()
            process.wait()
    return torch.load(folder / "found.pt", weights_only=False)  # our own, a moment ago


def main(functions: Mapping[str, Any]) -> None:
    ranks.join()
    gc.freeze()  # stage 3 collects garbage whenever it is prepared
    results = functions[sys.argv[1]](Path(sys.argv[2]))
    if ranks.leads():
        torch.save(results, Path(sys.argv[2]) / "found.pt")
    ranks.gathered(None)
    os._exit(0)  # DeepSpeed's threads may abort a process that ends by itself


if __name__ == "__main__":
    main(globals())
