"""Losses and gradients that are not finite: stopped at, or passed over, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_toys import Quadratic, ToyNet, ToyObjective, run

from registry.protocols import Batch, LossOutput
from trainers import (
    Budget,
    NonFiniteLoss,
    StopOnNonFinite,
)
from trainers.rng import generator

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


def test_non_finite_loss_names_step_term_rows_and_times_and_spares_the_weights() -> None:
    clean, _ = run(budget=Budget(steps=4))
    net = ToyNet()
    with pytest.raises(NonFiniteLoss) as caught:
        run(net=net, objective=ToyObjective(bad_step=4))
    message = str(caught.value)
    assert message.startswith("step 5: the loss is not finite in 4 of 8 rows")
    assert "u (4 rows)" in message
    noise = generator(0, 0, 4)
    torch.randn(8, 2, generator=noise)
    t = torch.rand(8, generator=noise)
    for row in (1, 3, 5, 7):
        assert f"row {row}: t={t[row].item():.6g} r={t[row].item():.6g} loss nan" in message
    assert "torch_engine.max_grad_norm" in message
    for a, b in zip(net.parameters(), clean.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_non_finite_loss_may_be_left_out_by_policy(caplog: pytest.LogCaptureFixture) -> None:
    skipping = StopOnNonFinite(policy="skip")
    state, losses = run(objective=ToyObjective(bad_step=2), callbacks=[skipping])
    assert state.step == 10
    assert caplog.text.count("step 3: the loss is not finite") == 1
    assert caplog.text.count("This update is left out") == 1
    assert all(p.isfinite().all() for p in state.net.parameters())
    assert torch.stack(losses).isfinite().all(1).tolist() == [True] * 2 + [False] + [True] * 7
    with pytest.raises(ValueError, match="run.non_finite = 'hope'; allowed: 'stop', 'skip'"):
        StopOnNonFinite(policy="hope")


def test_non_finite_gradient_of_a_finite_loss_spares_the_weights() -> None:
    class Cusp(Quadratic):
        def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
            out = super().loss(net, batch, rng)
            return LossOutput(per_sample=(out.per_sample * 0).sqrt(), t=out.t)

    net = ToyNet()
    with pytest.raises(NonFiniteLoss, match=r"step 1: the loss is finite, but its gradient is not"):
        run(net=net, objective=Cusp())
    assert all(torch.equal(a, b) for a, b in zip(
        net.parameters(), ToyNet().parameters(), strict=True))  # fmt: skip


def test_non_finite_loss_with_a_finite_gradient_spares_the_weights() -> None:
    class Constant(Quadratic):
        def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
            return LossOutput(per_sample=super().loss(net, batch, rng).per_sample + float("inf"))

    net = ToyNet()
    with pytest.raises(NonFiniteLoss, match="it is the weighting"):
        run(net=net, objective=Constant())
    assert torch.equal(net.inner.weight, ToyNet().inner.weight)


def test_stop_on_non_finite_looks_rarely_on_a_gpu_and_still_names_the_step() -> None:
    state, _ = run(budget=Budget(steps=1))
    guard = StopOnNonFinite(every=4)
    state.device = torch.device("cuda")  # nothing runs on it
    state.grad_norm = torch.tensor(1.0)
    for state.step in (1, 2, 3):
        value = float("nan") if state.step == 2 else 1.0
        guard.on_step(state, LossOutput(torch.tensor([1.0, value])))
    state.step = 4
    with pytest.raises(NonFiniteLoss, match="step 2: the loss is not finite in 1 of 2 rows"):
        guard.on_step(state, LossOutput(torch.tensor([1.0, 1.0])))
    state.step = 5
    guard.on_step(state, LossOutput(torch.tensor([float("inf")])))
    state.finished = True
    with pytest.raises(NonFiniteLoss, match="step 5"):
        guard.on_end(state)
