"""Optimizers and learning-rate schedules, as configurations that build them.

On a CPU the fused AdamW kernel takes a seventh of the time of the foreach one; RAdam has none, and
its foreach form takes half the time of the plain loop.

A schedule multiplies the learning rate: (step, progress) -> factor, `progress` being the share of
the budget that is spent, so one schedule serves budgets in steps, images and seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from registry import optimizers, schedules
from registry.protocols import Reference


@optimizers.register("adamw")
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay."""

    reference: ClassVar = Reference(
        title="Decoupled Weight Decay Regularization",
        authors="Loshchilov and Hutter",
        year=2019,
        arxiv="1711.05101",
    )

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check("adamw", self.lr, self.betas, self.eps, self.weight_decay)

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        params = list(params)
        return torch.optim.AdamW(
            params,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") for p in params),
        )


@optimizers.register("radam")
@dataclass(frozen=True, kw_only=True)
class RAdam:
    """Adam whose first steps are rectified by their variance; weight decay is decoupled."""

    reference: ClassVar = Reference(
        title="On the Variance of the Adaptive Learning Rate and Beyond",
        authors="Liu et al.",
        year=2020,
        arxiv="1908.03265",
    )

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check("radam", self.lr, self.betas, self.eps, self.weight_decay)

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RAdam(
            list(params),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
            foreach=True,
        )


@schedules.register("constant_lr")
@dataclass(frozen=True, kw_only=True)
class ConstantLr:
    """The learning rate itself after a linear warm-up."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_warmup("constant_lr", self.warmup_steps)

    def __call__(self, step: int, progress: float) -> float:
        return _warmup(step, self.warmup_steps)


@schedules.register("cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from 1 to `final` over the budget, times a linear warm-up."""

    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup("cosine", self.warmup_steps)
        if not 0 <= self.final <= 1:
            raise ValueError(f"cosine.final = {self.final!r} must lie in [0, 1]")

    def __call__(self, step: int, progress: float) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * progress))
        return _warmup(step, self.warmup_steps) * (self.final + (1 - self.final) * fall)


def _warmup(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps) if steps else 1.0


def _check_warmup(name: str, steps: int) -> None:
    if steps < 0:
        raise ValueError(f"{name}.warmup_steps = {steps!r} must not be negative")


def _check(
    name: str, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    if not lr > 0:
        raise ValueError(f"{name}.lr = {lr!r} must be positive")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"{name}.betas = {betas!r} must be two numbers in [0, 1)")
    if not eps > 0:
        raise ValueError(f"{name}.eps = {eps!r} must be positive")
    if not weight_decay >= 0:
        raise ValueError(f"{name}.weight_decay = {weight_decay!r} must not be negative")
