"""The plain engine: shares, precision, clipping, averages; and as gin builds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import gin
import pytest
import torch
from torch import Tensor, nn
from trainer_toys import Quadratic, Sgd, ToyData, ToyNet, ToyObjective, run, same

from registry.protocols import Batch, LossOutput, Share
from trainers import (
    AdamW,
    Budget,
    Callback,
    Cosine,
    TorchEngine,
    TrainState,
    TrainStep,
)
from zoo.ops import mean_flat
from zoo.teachers import EmaTeacher, Frozen

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


def test_accumulation_has_the_gradient_of_the_full_batch() -> None:
    results = {}
    for parts in (1, 4):
        state, losses = run(
            net=ToyNet(dropout=0.0), objective=Quadratic(), optimizer=Sgd(lr=0.1), batch_size=16,
            engine=TorchEngine(gradient_accumulation_steps=parts), budget=Budget(steps=3),
        )  # fmt: skip
        results[parts] = (state, torch.stack(losses))
    full, cut = results[1], results[4]
    # the same sums in another order, float32
    assert torch.allclose(full[1], cut[1], atol=1e-6)
    assert torch.allclose(full[0].grad_norm, cut[0].grad_norm, rtol=1e-5)
    for a, b in zip(full[0].net.parameters(), cut[0].net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_accumulation_draws_for_the_batch_and_joins_the_outputs_in_its_order() -> None:
    seen = []

    class Watching(Callback):
        def on_step(self, state: TrainState, out: LossOutput) -> None:
            seen.append(out)

    for parts in (1, 4):
        run(
            net=ToyNet(dropout=0.0), engine=TorchEngine(gradient_accumulation_steps=parts),
            callbacks=[Watching()], budget=Budget(steps=1),
        )  # fmt: skip
    whole, out = seen
    assert out.per_sample.shape == out.terms["u"].shape == out.t.shape == (8,)
    assert out.diagnostics["gap"].shape == (4,)
    assert torch.equal(out.t, whole.t)
    assert torch.allclose(out.per_sample, whole.per_sample, atol=1e-6)  # float32


def test_accumulation_is_exact_and_told_for_an_objective_that_does_not_share_its_rows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class AllRows(ToyObjective):
        def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
            return super().loss(net, replace(batch, share=Share()), rng)

    found = {}
    for parts in (1, 2):
        state, losses = run(
            net=ToyNet(dropout=0.0), objective=AllRows(), budget=Budget(steps=2),
            engine=TorchEngine(gradient_accumulation_steps=parts),
        )  # fmt: skip
        found[parts] = torch.stack([*losses, state.grad_norm.expand(8)])
    assert torch.allclose(found[1], found[2], atol=1e-6)  # float32
    assert caplog.text.count("batch.share.rows") == 1


def test_accumulation_has_dropout_of_its_own_in_each_share() -> None:
    class Twice(ToyData):
        def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            x0, cond = super().batch(step, n // 2, seed)
            return x0.repeat_interleave(2, 0), {"label": cond["label"].repeat_interleave(2)}

    def halves(dropout: float) -> tuple[Tensor, Tensor]:
        _, losses = run(
            net=ToyNet(dropout=dropout), dataset=Twice(), objective=Quadratic(),
            engine=TorchEngine(gradient_accumulation_steps=2), budget=Budget(steps=1),
        )  # fmt: skip
        return losses[0][::2], losses[0][1::2]  # rows 2 i and 2 i + 1 are the same point

    assert torch.equal(*halves(0.0))
    assert not torch.equal(*halves(0.5))


def test_engine_refuses_what_it_cannot_do() -> None:
    for wrong in (
        {"precision": "fp16"},
        {"max_grad_norm": -1.0},
        {"gradient_accumulation_steps": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TorchEngine(**wrong)
    with pytest.raises(ValueError, match="equal micro-batches"):
        run(engine=TorchEngine(gradient_accumulation_steps=3))


def test_clipping_bounds_the_update_and_reports_the_norm_before() -> None:
    before, after = ToyNet(), ToyNet()
    state, _ = run(
        net=after, engine=TorchEngine(max_grad_norm=0.01), optimizer=Sgd(), budget=Budget(steps=1)
    )
    free, _ = run(net=ToyNet(), optimizer=Sgd(), budget=Budget(steps=1))
    assert torch.equal(state.grad_norm, free.grad_norm)
    assert state.grad_norm > 0.02  # else the test would show nothing
    moved = torch.cat([(a - b).flatten() for a, b in zip(
        after.parameters(), before.parameters(), strict=True)])  # fmt: skip
    # float32 rounding of weights of order 1 against a step of 0.01
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_bf16_reaches_every_weight_after_a_pass_without_gradient() -> None:
    """Autocast's cache must not hand a weight cast without gradient to the pass with it."""
    engine = TorchEngine(precision="bf16")

    class TargetFirst(Quadratic):
        def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
            t = torch.zeros(len(batch))
            with torch.no_grad():
                target = net.outer(net.inner(torch.cat([batch.x0, batch.x0], 1)))
            assert target.dtype == torch.bfloat16
            u = net(batch.x0, t, t, batch.cond)["u"]
            assert u.dtype == torch.float32
            return LossOutput(per_sample=mean_flat((u - target - 1) ** 2))

    before, net = ToyNet(), ToyNet()
    run(net=net, objective=TargetFirst(), engine=engine, budget=Budget(steps=1), optimizer=Sgd())
    for a, b in zip(net.parameters(), before.parameters(), strict=True):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b)


def test_autocast_serves_checks_before_the_run() -> None:
    net, x = nn.Linear(2, 2), torch.randn(3, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with TorchEngine(precision=precision).autocast(CPU):
            assert net(x).dtype == dtype


def test_bf16_losses_are_near_those_of_fp32() -> None:
    _, full = run(budget=Budget(steps=5))
    _, half = run(budget=Budget(steps=5), engine=TorchEngine(precision="bf16"))
    # outputs of order 1, rounded to 8 bits: 2^-9 relative in u, some times that in a squared error
    assert torch.allclose(torch.stack(full), torch.stack(half), rtol=0.05, atol=0.02)
    assert not torch.equal(full[0], half[0])


def test_train_step_copies_a_teacher_that_needs_it() -> None:
    net, teacher = ToyNet(), EmaTeacher(decay=0.9)
    module = TrainStep(net, ToyObjective(teacher=teacher)).train()
    copy = module.teachers["teacher"]
    assert teacher.network is copy
    assert copy is not net
    assert same(copy.state_dict(), net.state_dict())
    assert net.training
    assert not copy.training
    assert not any(p.requires_grad for p in copy.parameters())
    with torch.no_grad():
        net.outer.bias += 1.0
    start = copy.outer.bias.clone()
    module.update_averages(0)  # at step 0 the decay is 0.1
    assert torch.allclose(copy.outer.bias, start + 0.9)


def test_train_step_serves_a_shared_teacher_once() -> None:
    @dataclass(frozen=True)
    class Outer:
        heads: ClassVar = ("u",)
        inner: ToyObjective
        teacher: EmaTeacher

        def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
            return self.inner.loss(net, batch, rng)

    teacher, net = EmaTeacher(decay=0.9), ToyNet()
    module = TrainStep(net, Outer(ToyObjective(teacher=teacher), teacher))
    assert list(module.teachers) == ["inner-teacher"]
    with torch.no_grad():
        net.outer.bias += 1.0
    start = teacher.network.outer.bias.clone()
    module.update_averages(0)
    assert torch.allclose(teacher.network.outer.bias, start + 0.9)
    own = TrainStep(net, Outer(ToyObjective(teacher=teacher), EmaTeacher()))
    assert list(own.teachers) == ["inner-teacher", "teacher"]


def test_frozen_teacher_is_neither_copied_nor_trained() -> None:
    teacher, other = Frozen(), ToyNet(seed=5)
    teacher.attach(other)
    start = {name: value.clone() for name, value in other.state_dict().items()}
    state, _ = run(objective=ToyObjective(teacher=teacher))
    assert state.engine.module.teachers["teacher"] is other
    assert same(start, other.state_dict())


def test_cpu_gin_file_builds_its_parts() -> None:
    gin.clear_config()
    try:
        text = (GIN / "trainer" / "cpu.gin").read_text()
        own = "\n".join(line for line in text.splitlines() if not line.startswith("run."))
        gin.parse_config(own)
        for name in ("torch_engine", "adamw", "cosine"):
            assert f"@{name}()" in text
        engine = gin.get_configurable(TorchEngine)()
        assert engine.precision == "fp32"
        run(
            engine=engine,
            optimizer=gin.get_configurable(AdamW)(),
            schedule=gin.get_configurable(Cosine)(),
        )
    finally:
        gin.clear_config()
