"""Optimizers and schedules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_toys import Quadratic, Sgd, ToyNet, run

from trainers import (
    AdamW,
    Budget,
    ConstantLr,
    Cosine,
    RAdam,
    TorchEngine,
)

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (
            AdamW(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
            lambda p: torch.optim.AdamW(
                p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False
            ),
        ),
        (
            RAdam(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
            lambda p: torch.optim.RAdam(
                p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1,
                decoupled_weight_decay=True, foreach=False,
            ),
        ),
    ],
)  # fmt: skip
def test_optimizer_fast_form_equals_the_plain_one(
    config: Any, plain: Callable[[Any], torch.optim.Optimizer]
) -> None:
    nets = [nn.Linear(5, 3), nn.Linear(5, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [config.build(nets[0].parameters()), plain(nets[1].parameters())]
    x = torch.randn(12, 5)
    for _ in range(12):
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).pow(2).mean().backward()
            optimizer.step()
    # another order of the same float32 operations
    assert torch.allclose(nets[0].weight, nets[1].weight, atol=1e-5)


@pytest.mark.parametrize("config", [AdamW, RAdam])
@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"eps": 0}, {"weight_decay": -1}],
)
def test_optimizer_refuses_values_out_of_range(config: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


def test_schedules_follow_their_formulas() -> None:
    assert [ConstantLr(warmup_steps=4)(s, 0.0) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = Cosine(warmup_steps=2, final=0.2)
    assert cosine(0, 0.0) == 0.5
    assert cosine(9, 0.5) == pytest.approx(0.6)
    assert cosine(9, 1.0) == pytest.approx(0.2)
    for wrong in ({"final": 1.5}, {"warmup_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Cosine(**wrong)


def test_schedule_sets_the_learning_rate_of_the_update() -> None:
    before, after = ToyNet(), ToyNet()
    engine = TorchEngine()
    state, _ = run(
        net=after, objective=Quadratic(), engine=engine, optimizer=Sgd(lr=2.0),
        schedule=ConstantLr(warmup_steps=4), budget=Budget(steps=1),
    )  # fmt: skip
    assert state.lr == 0.5
    moved = torch.cat([(a - b).flatten() for a, b in zip(
        after.parameters(), before.parameters(), strict=True)])  # fmt: skip
    # |step| = lr |gradient|; float32 rounding of weights of order 1
    assert moved.norm().item() == pytest.approx(0.5 * state.grad_norm.item(), rel=1e-5)
