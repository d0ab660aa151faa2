"""A small network, data set and objective, for the tests of trainers/."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from registry.protocols import Batch, LossOutput, Network, Teacher
from trainers import AdamW, Budget, Callback, CheckpointCallback, TrainState, fit
from zoo.ops import like, mean_flat, normal_like
from zoo.teachers import EmaTeacher


class ToyNet(nn.Module):
    """Two-layer network with dropout and a buffer that counts its training forwards."""

    def __init__(self, seed: int = 0, dropout: float = 0.2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Linear(4, 16)
            self.outer = nn.Linear(16, 2)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        if self.training:
            self.calls += 1
        hidden = torch.tanh(self.inner(torch.cat([x, t[:, None], r[:, None]], 1)))
        return {"u": self.outer(self.dropout(hidden)).to(x.dtype)}


@dataclass(frozen=True)
class ToyData:
    """A function of (step, n, seed) alone."""

    name: str = "toy"
    shape: tuple[int, ...] = (2,)
    num_classes: int = 3
    size: int = 0

    def identity(self) -> str:
        return "toy"

    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        rng = torch.Generator().manual_seed(1000 * seed + step)
        label = torch.randint(3, (n,), generator=rng)
        x0 = 0.3 * torch.randn(n, 2, generator=rng) + label[:, None].float() - 1
        return x0, {"label": label}

    def reference(self, n: int, seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.batch(0, n, seed)


@dataclass(frozen=True)
class GroupedData(ToyData):
    """The toy data, which can give groups of one label."""

    groups_by_label: ClassVar = True

    def batch(
        self, step: int, n: int, seed: int, same_label: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        x0, cond = super().batch(step, n, seed)
        label = cond["label"][::same_label].repeat_interleave(same_label)
        return x0 + (label - cond["label"])[:, None], {"label": label}


@dataclass(frozen=True, kw_only=True)
class ToyObjective:
    """Flow matching, pulled towards its own EMA teacher."""

    heads: ClassVar = ("u",)

    teacher: Teacher = field(default_factory=lambda: EmaTeacher(decay=0.9))
    pull: float = 0.1
    bad_step: int = -1  # this step's rows 1 and 3 get a loss that is not finite

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        x1 = normal_like(batch.x0, rng)
        t, bad = torch.rand(len(batch), generator=rng), torch.ones(len(batch))
        if batch.step == self.bad_step:
            bad[1::2] = float("nan")
        x0, x1, t, cond, bad = batch.share.rows(batch.x0, x1, t, batch.cond, bad)
        x_t = x0 + like(t, x1) * (x1 - x0)
        u = net(x_t, t, t, cond)["u"]
        target = self.teacher(net)(x_t, t, t, cond)["u"]
        error = bad * mean_flat((u - (x1 - x0)) ** 2)
        return LossOutput(
            per_sample=error + self.pull * mean_flat((u - target) ** 2),
            terms={"u": error.detach()},
            diagnostics={"gap": mean_flat((u - target) ** 2).detach()[: len(u) // 2]},
            t=t,
            r=t,
        )


@dataclass
class Losses(Callback):
    """Every step's losses, and the parameters' sum at the end."""

    rows: list[Tensor] = field(default_factory=list)

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        self.rows.append(out.per_sample.clone())


@dataclass
class StopAt(Callback):
    """Ends the run after this step."""

    step: int

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        if state.step == self.step:
            state.stop = "test"


def run(**changes: Any) -> tuple[TrainState, list[Tensor]]:
    """A short run of the toys with these arguments of `fit` changed; its state and losses."""
    losses = Losses()
    arguments: dict[str, Any] = {
        "net": ToyNet(),
        "objective": ToyObjective(),
        "dataset": ToyData(),
        "batch_size": 8,
        "budget": Budget(steps=10),
        "optimizer": AdamW(lr=1e-2),
    }
    arguments |= changes
    arguments["callbacks"] = (*arguments.get("callbacks", ()), losses)
    return fit(**arguments), losses.rows


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@dataclass(frozen=True)
class Sgd:
    """Plain gradient descent, whose step shows the gradient."""

    lr: float = 1.0

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)


@dataclass(frozen=True)
class Quadratic:
    """A loss without randomness: rows weigh differently, so that their order and mean matter."""

    heads: ClassVar = ("u",)

    def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
        t = torch.linspace(0, 1, len(batch))
        x0, t, cond = batch.share.rows(batch.x0, t, batch.cond)
        u = net(x0, t * 0, t * 0, cond)["u"]
        error = mean_flat((u - x0 * cond["label"][:, None]) ** 2)
        return LossOutput(per_sample=error, terms={"u": error.detach()}, t=t, r=t)


def trained(folder: Path, steps: int = 9, every: int = 3, keep: int = 10, **more: Any) -> Path:
    """A finished short run with checkpoints; the folder that holds them."""
    saving = CheckpointCallback(every=every, keep=keep)
    run(folder=folder, budget=Budget(steps=steps), callbacks=[saving], **more)
    return folder / "checkpoints"
