"""The loop: its order, its state and how it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_toys import Quadratic, ToyData, ToyNet, ToyObjective, run, same

from registry.protocols import Batch, LossOutput
from trainers import (
    AdamW,
    Budget,
    Callback,
    NonFiniteLoss,
    PeriodicEvaluation,
    TorchEngine,
    TrainState,
)
from zoo.teachers import EmaTeacher

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


def test_fit_repeats_bit_for_bit_and_differs_for_another_seed() -> None:
    first, losses = run(seed=3)
    torch.manual_seed(99)  # nothing may depend on the state of the global generator
    second, again = run(seed=3)
    assert torch.equal(torch.stack(losses), torch.stack(again))
    assert same(first.net.state_dict(), second.net.state_dict())
    _, other = run(seed=4)
    assert not torch.equal(torch.stack(losses), torch.stack(other))


def test_fit_is_not_changed_by_what_callbacks_draw() -> None:
    def evaluate(state: TrainState) -> dict[str, float]:
        assert not state.net.training
        assert not torch.is_grad_enabled()
        return {"noise": torch.randn(17).mean().item()}

    _, plain = run()
    state, evaluated = run(callbacks=[PeriodicEvaluation(fn=evaluate, every=2)])
    assert torch.equal(torch.stack(plain), torch.stack(evaluated))
    assert state.net.training


def test_fit_uses_dropout_of_its_own_at_every_step() -> None:
    class Repeated(ToyData):
        def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            return super().batch(0, n, seed)

    tiny = {"dataset": Repeated(), "objective": Quadratic(), "optimizer": AdamW(lr=1e-12)}
    _, losses = run(net=ToyNet(dropout=0.5), **tiny)
    assert len({tuple(rows.tolist()) for rows in losses}) == len(losses)
    _, losses = run(net=ToyNet(dropout=0.0), **tiny)
    assert torch.allclose(losses[0], losses[-1])  # the control: nothing else is random


def test_fit_ignores_gradients_left_by_others() -> None:
    net = ToyNet()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    _, losses = run(net=net)
    assert torch.equal(torch.stack(losses), torch.stack(run()[1]))


def test_fit_hands_callbacks_losses_without_their_graph() -> None:
    class Watching(Callback):
        def on_step(self, state: TrainState, out: LossOutput) -> None:
            assert not out.per_sample.requires_grad

    run(callbacks=[Watching()], budget=Budget(steps=1))
    run(
        callbacks=[Watching()],
        budget=Budget(steps=1),
        engine=TorchEngine(gradient_accumulation_steps=2),
    )


def test_fit_updates_the_teacher_after_the_weights_counting_from_zero() -> None:
    teacher, start = EmaTeacher(decay=0.9), ToyNet().inner.weight
    state, _ = run(objective=ToyObjective(teacher=teacher), budget=Budget(steps=1))
    # the decay of update 0 is 0.1; one more float32 rounding
    expected = 0.1 * start + 0.9 * state.net.inner.weight
    assert torch.allclose(teacher.network.inner.weight, expected, atol=1e-7)
    assert (state.net.inner.weight - start).abs().max() > 1e-3  # else the test would show nothing


def test_fit_learns() -> None:
    _, losses = run(net=ToyNet(dropout=0.0), budget=Budget(steps=200), batch_size=64)
    early, late = torch.stack(losses[:20]), torch.stack(losses[-20:])
    assert late.mean() < early.mean() - 5 * late.mean(1).std() / 20**0.5


def test_fit_ends_callbacks_after_an_exception_and_says_so() -> None:
    ends = []

    class Recording(Callback):
        def on_end(self, state: TrainState) -> None:
            ends.append(state.finished)

    run(callbacks=[Recording()])
    with pytest.raises(NonFiniteLoss):
        run(callbacks=[Recording()], objective=ToyObjective(bad_step=2))
    assert ends == [True, False]


def test_fit_refuses_losses_that_are_not_per_row() -> None:
    class Reduced(Quadratic):
        def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
            return LossOutput(per_sample=super().loss(net, batch, rng).per_sample.mean())

    with pytest.raises(ValueError, match=r"Reduced.loss returned per_sample of shape \(\)"):
        run(objective=Reduced())


def test_batch_that_no_memory_holds_is_refused_before_anything_is_read() -> None:
    """The data set would make its rows block by block, for hours."""
    with pytest.raises(ValueError, match=r"run.batch_size = 1000000000000: .* 7,451 GiB, and this"):
        run(batch_size=10**12)
