"""Data, networks and objectives that processes of ZeRO train in the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from few_rows import for_few_rows
from torch import Tensor, nn

import registry
import zoo  # noqa: F401  registers the objectives
from backbones.dit import DiT
from backbones.network import build_network
from registry.protocols import Batch, LossOutput, trains_derivative
from trainers import (
    Callback,
    TrainState,
    ranks,
)
from zoo.derivatives.methods import FiniteDifference, with_derivatives
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import normal_like
from zoo.points.velocities import PlugIn
from zoo.residuals import Exact
from zoo.teachers import Frozen
from zoo.times import LogitNormalPair


@dataclass(frozen=True)
class Pictures:
    """Labelled noise in [-1, 1], a function of the step."""

    shape: tuple[int, ...] = (1, 4, 4)
    num_classes: int = 3
    name: str = "pictures"

    groups_by_label: ClassVar = True

    def batch(
        self, step: int, n: int, seed: int, same_label: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        rng = torch.Generator().manual_seed(1000 * seed + step)
        label = torch.randint(3, (n // same_label,), generator=rng).repeat_interleave(same_label)
        return torch.randn(n, *self.shape, generator=rng).tanh(), {"label": label}


@dataclass(frozen=True, kw_only=True)
class InFours:
    """Energy distance between samples of one step and data, in groups of four rows."""

    heads: ClassVar = ("u",)
    group: ClassVar = 4

    def loss(self, net: nn.Module, batch: Batch, rng: torch.Generator) -> LossOutput:
        x1, one = normal_like(batch.x0, rng), torch.ones(len(batch))
        x0, x1, one, cond = batch.share.rows(batch.x0, x1, one, batch.cond)
        x = x1 - net(x1, one, 0 * one, cond)["u"]
        fake, real = (rows.flatten(1).unflatten(0, (-1, 4)) for rows in (x, x0))
        others = torch.cdist(fake, fake.detach()).sum(2) / 3
        loss = (torch.cdist(fake, real).mean(2) - others).flatten()
        return LossOutput(per_sample=loss, t=one, r=0 * one)


@dataclass(frozen=True)
class Sgd:
    """Gradient descent: the weights show the gradients, and an error grows no more than they."""

    lr: float = 0.05

    def build(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)


class Watch(Callback):
    """The loss of every step over all processes, the gradient's norm, and fp16's scale."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.scales: list[tuple[float, int]] = []

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        total = sum(ranks.gathered(float(out.per_sample.double().sum())))
        self.losses.append(total / state.batch_size)
        assert state.grad_norm is not None
        self.norms.append(float(state.grad_norm))
        if scale := getattr(state.engine, "_scale", None):
            self.scales.append((scale.value, scale.good))


def network(keys: tuple[str, ...], seed: int = 0) -> nn.Module:
    """A DiT with activation checkpointing whose every weight takes part."""
    torch.manual_seed(seed)
    dit = partial(DiT, dim=16, depth=1, num_heads=2, patch=4, checkpointing=True)
    net = build_network(dit, Pictures().shape, Pictures().num_classes, keys)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def objective(name: str) -> Any:
    """By its registered name, or dumo with the exact derivative, or decm distilled.

    Trained derivatives are by differences here.
    """
    if name == "dumo_exact":
        return registry.objectives.get("dumo")(residual=Exact())
    if name == "in_fours":
        return InFours()
    if name == "plug_in":
        return MeanFlow(velocity=PlugIn(fraction=0.5), omega=0.5)
    if name == "one_row":
        return MeanFlow(times=LogitNormalPair(off_diagonal_fraction=0.1))
    if name == "decm_distilled":
        made = registry.objectives.get("decm")(teacher=Frozen(), guidance_scale=1.5)
        made.teacher.attach(network(("v",), seed=5))
        return made
    made = for_few_rows(registry.objectives.get(name)())
    if not trains_derivative(made):
        return made
    # Exact ones are not for stage 3, nor for activation checkpointing: see zero_trained_work.py.
    return with_derivatives(made, lambda _: FiniteDifference())


def names() -> list[str]:
    return [*registry.objectives.names(), "dumo_exact", "decm_distilled"]
