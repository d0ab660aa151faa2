"""Training in one process, on one device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.pretrained.tensors import save_tensors
from registry import engines
from registry.protocols import Batch, LossOutput, Optimizer, Share
from trainers import ranks
from trainers.checkpoints.weights import (
    check_state,
    copied,
    copied_state,
    read_module,
    read_state,
    save_state,
)
from trainers.checkpoints.whole_folders import BrokenCheckpoint
from trainers.engines.train_step import TrainStep


@engines.register("torch_engine")
@dataclass(kw_only=True, eq=False)
class TorchEngine:
    """Plain PyTorch on one device, in fp32 or with bf16 autocast."""

    renamed_parameters: ClassVar = {
        "clip": "max_grad_norm",
        "accumulate": "gradient_accumulation_steps",
    }

    precision: str = "fp32"
    max_grad_norm: float = 0.0  # largest norm of the gradient; 0 is off
    gradient_accumulation_steps: int = 1  # micro-batches per step

    module: TrainStep = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(
                f"torch_engine.precision = {self.precision!r} is neither fp32 nor bf16"
            )
        if not self.max_grad_norm >= 0:
            raise ValueError(
                f"torch_engine.max_grad_norm = {self.max_grad_norm!r} must not be negative (0 is "
                "off)"
            )
        if self.gradient_accumulation_steps < 1:
            raise ValueError(
                "torch_engine.gradient_accumulation_steps = "
                f"{self.gradient_accumulation_steps!r} must be 1 or more"
            )

    def check_batch(self, batch_size: int) -> None:
        """ValueError unless the batch can be cut into equal micro-batches."""
        if batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"a batch of {batch_size} cannot be cut into "
                f"torch_engine.gradient_accumulation_steps = {self.gradient_accumulation_steps} "
                "equal micro-batches; choose a divisor of the batch size"
            )

    def prepare(
        self, module: TrainStep, optimizer: Optimizer, device: torch.device, batch_size: int
    ) -> None:
        if ranks.count() > 1:
            raise ValueError(
                f"torch_engine runs in one process, and there are {ranks.count()}; "
                "include 'trainer/zero2.gin' or bind run.engine = @zero_engine()"
            )
        self.check_batch(batch_size)
        self.module = module.to(device).train()
        module.autocast = partial(self.autocast, device)
        module.zero_grad(set_to_none=True)
        self._params = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = optimizer.build(self._params)
        self._lrs = [group["lr"] for group in self._optimizer.param_groups]
        self._device = device
        self._losses: list[Tensor] = []

    def shares(self, batch: Batch) -> Iterator[Batch]:
        for number in range(self.gradient_accumulation_steps):
            yield replace(batch, share=Share(number, self.gradient_accumulation_steps))

    def __call__(self, batch: Batch, rng: torch.Generator) -> LossOutput:
        return self.module(batch, rng)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        # Without autocast's cache, which in older versions of torch hands a weight that was cast in
        # a pass without gradient, cut off from its parameter, to the pass with gradient.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def backward(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())
        steps = self.gradient_accumulation_steps
        (loss / steps if steps > 1 else loss).backward()

    def step(self, lr_factor: float) -> Tensor:
        """Update the weights once.

        On a CPU, where the check costs nothing, a loss or gradient that is not finite makes no
        update: the weights stay finite, and the gradients are kept, to find the cause.
        """
        norm = self._gradient_norm()
        losses, self._losses = self._losses, []
        if self._device.type == "cpu" and not all(math.isfinite(x) for x in (norm, *losses)):
            return norm
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * lr_factor
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def holds_back(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def update_averages(self, step: int) -> None:
        self.module.update_averages(step)

    def save(self, folder: Path) -> Callable[[], list[Path]]:
        networks = {
            folder / f"{name}.safetensors": {
                key: copied(value) for key, value in module.state_dict().items()
            }
            for name, module in self._networks()
        }
        state = copied_state(self._optimizer.state_dict())

        def write() -> list[Path]:
            for path, tensors in networks.items():
                save_tensors(path, tensors)
            save_state(folder / "optimizer.pt", state)
            return [*networks, folder / "optimizer.pt"]

        return write

    def load(self, folder: Path) -> None:
        """Read everything before anything is put in its place.

        BrokenCheckpoint for files that cannot be read or do not fit.
        """
        if (folder / "zero.json").exists():
            raise BrokenCheckpoint(f"{folder} was made by zero_engine: go on with @zero_engine()")
        networks = [
            (module, read_module(folder / f"{name}.safetensors", module))
            for name, module in self._networks()
        ]
        state = read_state(path := folder / "optimizer.pt")
        check_state(path, state, self._optimizer)
        for module, tensors in networks:
            module.load_state_dict(tensors)
        # The options are the run's own, so that a damaged file cannot change them.
        options = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["state"], "param_groups": options})

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        """The networks that a checkpoint keeps, by the names of their files."""
        yield "net", self.module.net
        for name, teacher in self.module.teachers.items():
            yield f"teacher_{name}", teacher
        for name, average in self.module.emas.items():
            yield f"ema_{name}", average

    def _gradient_norm(self) -> Tensor:
        if self.max_grad_norm:
            return nn.utils.clip_grad_norm_(self._params, self.max_grad_norm)
        return nn.utils.get_total_norm([p.grad for p in self._params if p.grad is not None])
