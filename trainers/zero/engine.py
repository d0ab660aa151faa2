"""DeepSpeed ZeRO as an engine: optimizer state, gradients and weights are sharded.

    stage 0    gradients averaged, nothing sharded
    stage 1    optimizer state        stage 2    and gradients        stage 3    and weights

Stage 3 shards averages and teachers too. Weights, averages and optimizer state are float32 in every
precision; bf16 and fp16 are autocast, fp16 with a dynamic loss scale. Every process makes the same
global batch and computes its share, so losses and gradients are those of one process. No operator
is compiled, and no compiler is needed. It is tested on CPU processes (gloo), and written for CUDA
too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from registry import engines
from registry.protocols import Batch, LossOutput, Optimizer, Reference, Share
from trainers import ranks
from trainers.engines import TrainStep, as_trained
from trainers.sharding import shards
from trainers.zero import checkpoint
from trainers.zero.deepspeed_import import quiet_deepspeed
from trainers.zero.derivatives import (
    NoExactDerivative,
    allow_forward_mode,
    check_exact,
    needs_forward_mode,
)
from trainers.zero.loss_scale import LossScale
from zoo.derivatives.methods import FiniteDifference, with_derivatives

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALLOWED: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "precision": tuple(PRECISIONS),
    "without_exact": ("refuse", "finite_difference"),
}
# They have no effect on the result of a run, which may be resumed with other values of them.
WITHOUT_EFFECT = (
    "stage",
    "gradient_accumulation_steps",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "timeout_minutes",
)

log = logging.getLogger(__name__)


@engines.register("zero_engine")
@dataclass(kw_only=True, eq=False)
class ZeroEngine:
    """DeepSpeed's ZeRO over the processes of a launcher, or over one.

    The fields from `offload_optimizer` to `stage3_max_live_parameters` have the names that they
    have in DeepSpeed's "zero_optimization". Bucket sizes count elements. Offloading keeps optimizer
    state (stages 1-3) and weights (stage 3) in the memory of the host. `without_exact` says what
    happens in stage 3 if exact derivatives do not work through DeepSpeed: the run is refused, or
    takes central differences. If a process stops answering, the others wait `timeout_minutes` and
    then raise an error.
    """

    reference: ClassVar = Reference(
        title="ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
        authors="Rajbhandari et al.",
        year=2019,
        arxiv="1910.02054",
    )

    several_processes: ClassVar = True
    renamed_parameters: ClassVar = {
        "clip": "max_grad_norm",
        "accumulate": "gradient_accumulation_steps",
        "offload_weights": "offload_param",
        "overlap": "overlap_comm",
        "reduce_bucket": "reduce_bucket_size",
        "gather_bucket": "allgather_bucket_size",
        "prefetch_bucket": "stage3_prefetch_bucket_size",
        "max_live": "stage3_max_live_parameters",
    }

    stage: int = 2
    precision: str = "fp32"
    max_grad_norm: float = 0.0  # largest norm of the gradient; 0 is off
    gradient_accumulation_steps: int = 1  # micro-batches per process and step
    offload_optimizer: bool = False
    offload_param: bool = False
    overlap_comm: bool = True  # communication beside computation
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000  # elements gathered at a time
    without_exact: str = "refuse"
    timeout_minutes: float = 30.0

    module: TrainStep = field(init=False, repr=False)
    config: dict[str, Any] = field(init=False, repr=False)  # DeepSpeed's, once prepared
    _deepspeed: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"zero_engine.{name} = {getattr(self, name)!r}; "
                    f"allowed: {', '.join(map(repr, allowed))}"
                )
        if not self.max_grad_norm >= 0:
            raise ValueError(
                f"zero_engine.max_grad_norm = {self.max_grad_norm!r} must not be negative (0 is "
                "off)"
            )
        if not self.timeout_minutes > 0:
            raise ValueError(
                f"zero_engine.timeout_minutes = {self.timeout_minutes!r} must be above 0"
            )
        for name in ("gradient_accumulation_steps", "reduce_bucket_size", "allgather_bucket_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"zero_engine.{name} = {getattr(self, name)!r} must be 1 or more")
        for name, first in (("offload_optimizer", 1), ("offload_param", 3)):
            if getattr(self, name) and self.stage < first:
                raise ValueError(
                    f"zero_engine.{name} needs zero_engine.stage = {first} or more; it is "
                    f"{self.stage}"
                )

    @property
    def whole_weights(self) -> bool:
        """Stage 3 gathers weights layer by layer, by autograd.Functions around every layer."""
        return self.stage < 3

    def check_batch(self, batch_size: int) -> None:
        self.deepspeed_config(batch_size, ranks.count())

    def provider_files(self, batch_size: int) -> dict[str, str]:
        config = self.deepspeed_config(batch_size, ranks.count())
        return {"deepspeed.json": json.dumps(config, indent=2) + "\n"}

    def deepspeed_config(self, batch_size: int, processes: int) -> dict[str, Any]:
        """The configuration for DeepSpeed; ValueError if the batch cannot be cut equally."""
        parts = processes * self.gradient_accumulation_steps
        if batch_size % parts:
            raise ValueError(
                f"a batch of {batch_size} cannot be shared out equally to {processes} processes "
                "with zero_engine.gradient_accumulation_steps = "
                f"{self.gradient_accumulation_steps}; run.batch_size must be a multiple of {parts}"
            )
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": self.overlap_comm,
            "contiguous_gradients": True,
            "reduce_bucket_size": self.reduce_bucket_size,
            "allgather_bucket_size": self.allgather_bucket_size,
        }
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload_param:
            zero["offload_param"] = {"device": "cpu"}
        if self.stage == 3:
            zero |= {
                "memory_efficient_linear": False,  # it has no forward-mode rule
                "stage3_param_persistence_threshold": 0,  # averages need every weight sharded
                "stage3_prefetch_bucket_size": self.stage3_prefetch_bucket_size,
                "stage3_max_live_parameters": self.stage3_max_live_parameters,
                "stage3_max_reuse_distance": self.stage3_max_live_parameters,
            }
        return {
            "train_batch_size": batch_size,
            "train_micro_batch_size_per_gpu": batch_size // parts,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            # Written even where it is 0, since DeepSpeed's default is 1.0. In stage 0 `step` clips.
            "gradient_clipping": float(self.max_grad_norm if self.stage else 0),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # it is compiled; torch's is fused too
            "steps_per_print": 2**31,
        }

    def prepare(
        self, module: TrainStep, optimizer: Optimizer, device: torch.device, batch_size: int
    ) -> None:
        ranks.join()
        module.objective = as_trained(module.objective, self)
        if self._deepspeed is not None:
            self._deepspeed.destroy()
        self.config = self.deepspeed_config(batch_size, ranks.count())
        with quiet_deepspeed(device) as deepspeed:
            deepspeed.init_distributed(auto_mpi_discovery=False)  # uses the group of `join`
            if self.stage == 3:  # shard weight by weight, so that no device ever holds them all
                deepspeed.zero.Init(module=module, config_dict_or_path=dict(self.config))
        self.module = module.to(device).train()
        module.autocast = partial(self.autocast, device)
        self._scale = LossScale() if self.precision == "fp16" else None
        self._params = [p for p in module.parameters() if p.requires_grad]
        if self._scale is not None:
            for p in self._params:
                p.register_hook(self._scale.undo)
        with quiet_deepspeed(device) as deepspeed:
            self._deepspeed, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer.build(self._params), config=dict(self.config)
            )
        ranks.wait_at_most(self.timeout_minutes)
        self._lrs = [group["lr"] for group in self._optimizer.param_groups]
        module.register_forward_hook(self._keep, prepend=True)
        self._checked = self.stage < 3 or not needs_forward_mode(module.objective)
        if self.stage == 3:
            allow_forward_mode(module)

    def shares(self, batch: Batch) -> Iterator[Batch]:
        count = ranks.count() * self.gradient_accumulation_steps
        for number in range(ranks.number(), count, ranks.count()):
            yield replace(batch, share=Share(number, count))

    def __call__(self, batch: Batch, rng: torch.Generator) -> LossOutput:
        if not self._checked:
            self._check_derivative(batch)
        per_sample = self._deepspeed(batch, rng)
        return replace(self._out, per_sample=per_sample)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        # Without autocast's cache, which would keep what stage 3 has released.
        return torch.autocast(device.type, PRECISIONS[self.precision], cache_enabled=False)

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss * self._scale.value if self._scale else loss)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self, lr_factor: float) -> Tensor:
        """Update the weights once; a gradient that is not finite makes no update on any process."""
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * lr_factor
        if self.stage == 0:
            norm = nn.utils.get_total_norm([p.grad for p in self._params if p.grad is not None])
            if not norm.isfinite():
                self._deepspeed.zero_grad()
            elif self.max_grad_norm:
                nn.utils.clip_grads_with_norm_(self._params, self.max_grad_norm, norm)
            self._deepspeed.step()
        else:
            self._deepspeed.step()
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm())
        return norm if self._scale is None else self._scale.follow(norm)

    def holds_back(self, device: torch.device) -> bool:
        return True

    def update_averages(self, step: int) -> None:
        with shards(self.module):
            self.module.update_averages(step)

    def save(self, folder: Path) -> Callable[[], list[Path]]:
        about: dict[str, Any] = {"stage": self.stage}
        if self._scale is not None:
            about["loss_scale"] = [self._scale.value, self._scale.good]
        return checkpoint.save(self.module, self._optimizer, about, folder)

    def load(self, folder: Path) -> None:
        about = checkpoint.load(self.module, self._optimizer, folder)
        if self._scale is not None and "loss_scale" in about:
            self._scale.value, self._scale.good = about["loss_scale"]

    def _keep(self, module: nn.Module, inputs: Any, out: LossOutput) -> Tensor:
        """Keep the output and return the losses: DeepSpeed's hooks look for tensors there."""
        self._out = out
        return out.per_sample

    def _check_derivative(self, batch: Batch) -> None:
        self._checked = True
        try:
            check_exact(self.module.net, self.module.objective, batch)
        except NoExactDerivative as problem:
            what = f"exact derivatives do not work under ZeRO stage 3 here: {problem}."
            if self.without_exact == "refuse":
                raise ValueError(
                    f"{what}\nSet zero_engine.stage = 2, or accept central differences in float32 "
                    "by zero_engine.without_exact = 'finite_difference'"
                ) from problem
            log.warning("%s Central differences in float32 take their place", what)
            self.module.objective = with_derivatives(
                self.module.objective, lambda _: FiniteDifference()
            )
