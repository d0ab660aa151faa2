"""The engine that the loop drives, and the module of network, objective and teachers that it runs.

The objective runs inside `TrainStep.forward`, so every network call of a step passes through the
hooks that an engine may put on that module. An engine shares the global batch out to processes, and
to micro-batches of gradient accumulation. An objective draws for the whole batch and computes the
loss of a share of its rows, and the mean over equal shares of their mean losses is the mean over
the batch. So neither the noise, times, labels, couplings and quotas nor the gradient depend on how
a batch is shared out. Only dropout draws for each share. An engine numbers the shares alone: that
the groups of an objective stay whole is the business of `TrainStep`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.pretrained.tensors import digest_of, save_tensors
from registry import derivatives, engines
from registry.protocols import (
    Batch,
    Derivative,
    Engine,
    Features,
    LossOutput,
    Objective,
    Optimizer,
    Share,
    Teacher,
    couples_rows,
    group_of,
    has_whole_weights,
    parts,
    trains_derivative,
)
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
from trainers.ema.averages import Ema, PowerEma, frozen_copy
from zoo.derivatives.one_pass import apart, with_graphs
from zoo.dropout import shared_dropout, shares_dropout

log = logging.getLogger(__name__)


class TrainStep(nn.Module):
    """A network, its objective, teachers, features and averages: one module whose call is the loss.

    `needs_whole` tells whether the loss of a share may read data of other rows. It is True until a
    call has shown that the objective computes its share alone.
    """

    def __init__(
        self,
        net: nn.Module,
        objective: Objective,
        ema_decays: Sequence[float] = (),
        power_emas: Sequence[float] = (),
    ):
        super().__init__()
        self.net = net
        self.objective = objective
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.needs_whole = True
        self.group = group_of(objective)
        self._couples_rows = couples_rows(objective)
        self.teachers = nn.ModuleDict()
        self._owners: list[Teacher] = []
        for path, teacher in _distinct(objective, Teacher):
            key = _key(path)
            if teacher.needs_copy:
                self.teachers[key] = frozen_copy(net)
                teacher.attach(self.teachers[key])
                self._owners.append(teacher)
            elif isinstance(own := getattr(teacher, "network", None), nn.Module):
                self.teachers[key] = own
        self.features = nn.ModuleDict({_key(path): net for path, net in _feature_nets(objective)})
        self._shares_dropout = any(shares_dropout(part) for _, part in parts(objective))
        self._emas: list[Ema | PowerEma] = [Ema(net, decay) for decay in ema_decays]
        self._emas += [PowerEma(net, sigma_rel) for sigma_rel in power_emas]
        self.averages = nn.ModuleDict({_key(ema.name): ema.net for ema in self._emas})

    def forward(self, batch: Batch, rng: torch.Generator) -> LossOutput:
        batch = replace(batch, share=replace(batch.share, group=self.group))
        with self.autocast(), shared_dropout() if self._shares_dropout else nullcontext():
            out = self.objective.loss(self.net, batch, rng)
        rows, shape = batch.share.size(len(batch)), tuple(out.per_sample.shape)
        self.needs_whole = self._couples_rows or shape != (rows,)
        if shape == (len(batch),) != (rows,):
            _warn_of_waste(type(self.objective).__name__)
            per_sample, t, r = batch.share.rows(out.per_sample, out.t, out.r)
            return replace(out, per_sample=per_sample, t=t, r=r)
        if shape != (rows,):
            raise ValueError(
                f"{type(self.objective).__name__}.loss returned per_sample of shape {shape}; it "
                f"must hold one loss per row, ({rows},)"
            )
        return out

    def train(self, mode: bool = True) -> TrainStep:
        super().train(mode)
        self.teachers.eval()  # targets are evaluated without dropout
        self.averages.eval()
        self.features.eval()
        return self

    @property
    def emas(self) -> dict[str, nn.Module]:
        """The averages by their decay, then by `power_name` of their `sigma_rel`."""
        return {ema.name: ema.net for ema in self._emas}

    def compile_networks(self) -> None:
        """Compile the network and its teachers; everything around them stays eager."""
        for net in (self.net, *self.teachers.values()):
            compile_in_place(net)

    def update_averages(self, step: int) -> None:
        """After update number `step`, counting from 0."""
        for teacher in self._owners:
            teacher.update(self.net, step)
        for ema in self._emas:
            ema.update(step)


def as_trained(objective: Objective, engine: Engine, compile: bool = False) -> Objective:
    """The objective, or a part of it, as it is trained on this engine, compiled or not.

    A derivative that is taken together with the value follows the network's forward. Where weights
    are not whole meanwhile, or the network is compiled, it takes a pass of its own instead. So it
    does where the objective trains its derivative and the one that is taken with the value has no
    graph. ValueError where no derivative of the objective can be trained.
    """
    whole = has_whole_weights(engine)
    changed: Objective = objective if whole and not compile else apart(objective)
    if trains_derivative(objective):
        changed = with_graphs(changed)
        if not whole:
            _check_in_pieces(changed, engine)
    return changed


def _check_in_pieces(objective: Objective, engine: Engine) -> None:
    """ValueError for a trained derivative in forward mode where weights are not whole.

    Its backward needs each weight for the value and for the tangent. Weights that are gathered
    layer by layer may be released in between, and are never gathered for a layer whose value the
    loss does not use.
    """
    for path, part in parts(objective):
        if isinstance(part, Derivative) and part.needs_forward_ad:
            raise ValueError(
                f"the objective {type(objective).__name__} trains its derivative, and its {path} = "
                f"@{derivatives.name_of(part)}() cannot be trained while run.engine = "
                f"@{engines.name_of(engine)}() keeps weights in pieces: its backward asks for "
                "weights that may be released. Set zero_engine.stage = 2, or bind "
                f"@finite_difference() to its {path}"
            )


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


def compile_in_place(net: nn.Module) -> None:
    """Compile the network: one set of kernels for each number of rows, with eager's roundings.

    Without `emulate_precision_casts` the compiler leaves out a cast down and up again, and that
    moved time frequencies by 0.4 %.
    """
    net.compile(dynamic=False, options={"emulate_precision_casts": True})


@lru_cache  # once per class
def _warn_of_waste(name: str) -> None:
    log.warning(
        "%s.loss computes every row of the batch for each of its shares. The gradient is right, "
        "but the work is repeated; to share it out, keep the rows of the share after all draws: "
        "x0, x1, t, cond = batch.share.rows(batch.x0, x1, t, batch.cond)",
        name,
    )


def _key(path: str) -> str:
    """The path as the name of a module, which must not have dots."""
    return path.replace(".", "-")


def _distinct(objective: Objective, contract: Any) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, part in parts(objective):
        if isinstance(part, contract) and not isinstance(part, type) and id(part) not in seen:
            seen.add(id(part))
            yield path, part


def feature_sha256(objective: Objective) -> dict[str, str]:
    """What identifies the weights of each of the objective's features, by its field."""
    return {path: digest_of(net.state_dict()) for path, net in _feature_nets(objective)}


def _feature_nets(objective: Objective) -> Iterator[tuple[str, nn.Module]]:
    for path, part in _distinct(objective, Features):
        if part.feature_net is not None:
            yield path, part.feature_net
