"""Accumulation and activation checkpointing change no objective's loss and gradient.

Measured in float64, where what is left is the order of summation: 1e-15 relative. Under
accumulation the noise, times, labels, couplings and quotas are those of the whole batch, so only
dropout, which draws for each share, is another.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from backbone_cases import awake
from few_rows import for_few_rows
from torch import Tensor

import registry
from backbones.dit import DiT
from backbones.network import build_network
from registry.protocols import Batch, group_of, parts, required_heads, trains_derivative
from trainers.engines import TorchEngine, TrainStep
from trainers.optim import AdamW
from trainers.rng import generator
from zoo.derivatives.methods import FiniteDifference, with_derivatives
from zoo.teachers import Frozen

ROWS, CPU = 16, torch.device("cpu")
each_objective = pytest.mark.parametrize("name", registry.objectives.names())


def network(keys: tuple[str, ...], checkpointing: bool = False):
    torch.manual_seed(0)
    trunk = partial(DiT, dim=8, depth=2, num_heads=2, checkpointing=checkpointing)
    return awake(build_network(trunk, (1, 4, 4), 3, keys)).double()


def losses_and_gradients(
    name: str, *, accumulate: int = 1, checkpointing: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Of step 0, where every cluster of rows takes part."""
    objective = for_few_rows(registry.objectives.build(name))
    if trains_derivative(objective):  # with activation checkpointing by differences alone
        objective = with_derivatives(objective, lambda _: FiniteDifference())
    for _, part in parts(objective):
        if isinstance(part, Frozen):
            part.attach(network(("v",)))
    net = network(required_heads(objective), checkpointing)
    engine = TorchEngine(gradient_accumulation_steps=accumulate)
    engine.prepare(TrainStep(net, objective), AdamW(), CPU, ROWS)
    drawn = torch.Generator().manual_seed(1)
    x0 = torch.randn(ROWS, 1, 4, 4, generator=drawn, dtype=torch.float64)
    whole = Batch(x0, {"label": torch.arange(ROWS) % 3})
    rows = torch.zeros(ROWS, dtype=torch.float64)
    for batch in engine.shares(whole):
        per_sample = engine(batch, generator(0, 0, 0)).per_sample
        engine.backward(per_sample.mean())
        share = replace(batch.share, group=group_of(objective))
        rows[share.rows(torch.arange(ROWS))[0]] = per_sample.detach()
    return rows, [p.grad for p in net.parameters() if p.grad is not None]


@each_objective
@pytest.mark.parametrize("how", [{"accumulate": 4}, {"checkpointing": True}], ids=str)
def test_memory_is_saved_without_another_loss_or_gradient(name, how):
    expected_rows, expected = losses_and_gradients(name)
    rows, gradients = losses_and_gradients(name, **how)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-12, atol=1e-12)
    assert len(gradients) == len(expected)
    assert sum(float(g.abs().sum()) for g in expected) > 1e-3
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
