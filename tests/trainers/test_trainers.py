"""The loop, engines, budgets, streams, optimizers and callbacks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import gin
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from trainer_toys import StopAt, ToyData, ToyNet, ToyObjective, run, same

from registry import progress
from registry.protocols import Batch, LossOutput, Share
from trainers import (
    AdamW,
    Budget,
    Callback,
    ConstantLr,
    Cosine,
    MetricsLog,
    NonFiniteLoss,
    PeriodicEvaluation,
    ProgressBar,
    RAdam,
    StopOnNonFinite,
    TorchEngine,
    TrainState,
    TrainStep,
)
from trainers.rng import generator, seed_dropout, stream
from zoo.ops import mean_flat
from zoo.teachers import EmaTeacher, Frozen

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


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


# --- streams


def test_stream_has_no_collision_in_the_bits_that_torch_keeps() -> None:
    words = {stream(7, rank, step) & 0xFFFFFFFF for rank in range(64) for step in range(4000)}
    assert len(words) == 64 * 4000  # at random there would be about 7.6 collisions


@given(seed=st.integers(-(2**63), 2**63 - 1), rank=st.integers(0, 1022), step=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_stream_changes_half_its_bits_between_neighbours(seed: int, rank: int, step: int) -> None:
    here = stream(seed, rank, step)
    for other in (stream(seed + 1, rank, step), stream(seed, rank + 1, step)):
        for shift in (0, 32):
            flipped = ((here ^ other) >> shift & 0xFFFFFFFF).bit_count()
            assert 1 <= flipped <= 31  # 16 +- 2.8; 0 and 32 are 5.7 standard deviations away


def test_stream_flips_each_bit_half_of_the_time() -> None:
    n = 4000
    for a, b in (((0, 1), (0, 0)), ((1, 0), (0, 0)), ((0, 1), (1, 0))):
        flips = [stream(3, a[0], s + a[1], 1) ^ stream(3, b[0], s + b[1], 1) for s in range(n)]
        for bit in range(64):
            share = sum(word >> bit & 1 for word in flips) / n
            assert abs(share - 0.5) < 5 * 0.5 / n**0.5, (a, b, bit)  # 5 standard errors


def test_generator_noise_is_uncorrelated_between_neighbours() -> None:
    n = 1 << 14
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)]
    noise = torch.stack([torch.randn(n, generator=generator(*place)) for place in places])
    correlation = torch.corrcoef(noise) - torch.eye(len(places))
    assert correlation.abs().max() < 5 / n**0.5


def test_dropout_stream_is_not_the_noise_stream() -> None:
    seed_dropout(0, 0, 0)
    dropout = torch.rand(8)
    assert not torch.equal(dropout, torch.rand(8, generator=generator(0, 0, 0)))
    seed_dropout(0, 0, 0)
    assert torch.equal(dropout, torch.rand(8))


# --- budgets


@pytest.mark.parametrize("given_", [{}, {"steps": 5, "seconds": 1.0}, {"steps": 0}, {"images": -1}])
def test_budget_takes_exactly_one_positive_amount(given_: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget(**given_)


@pytest.mark.parametrize(("budget", "steps"), [(Budget(steps=6), 6), (Budget(images=41), 6)])
def test_budget_ends_the_run_at_the_first_step_that_spends_it(budget: Budget, steps: int) -> None:
    state, losses = run(budget=budget)
    assert (state.step, state.images, len(losses)) == (steps, steps * 8, steps)
    assert budget.done(state)
    assert budget.progress(state) == 1.0


def test_budget_progress_reaches_the_objective() -> None:
    seen = []

    class Watching(ToyObjective):
        def loss(self, net: Any, batch: Batch, rng: torch.Generator) -> LossOutput:
            seen.append((batch.step, batch.progress))
            return super().loss(net, batch, rng)

    run(objective=Watching(), budget=Budget(images=32))
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]


def test_budget_in_seconds_does_not_count_evaluation() -> None:
    def evaluate(state: TrainState) -> dict[str, float]:
        time.sleep(0.1)
        return {}

    start = time.perf_counter()
    state, _ = run(budget=Budget(seconds=0.2), callbacks=[PeriodicEvaluation(fn=evaluate, every=5)])
    evaluations = state.step // 5
    assert evaluations >= 2  # a step of the toy takes about a millisecond
    assert 0.2 <= state.seconds < 0.2 + 0.1  # would hold every evaluation if they were counted
    assert time.perf_counter() - start >= 0.2 + 0.1 * evaluations


# --- optimizers and schedules


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


# --- the loop


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


# --- engines


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


# --- losses that are not finite


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


# --- callbacks


def test_metrics_are_means_over_the_window() -> None:
    records: list[tuple[dict[str, float], int]] = []

    def record(values: dict[str, float], step: int) -> None:
        records.append((values, step))

    _, losses = run(callbacks=[MetricsLog(record=record, every=4)])
    assert [step for _, step in records] == [4, 8, 10]
    for (values, step), window in zip(records, (losses[:4], losses[4:8], losses[8:]), strict=True):
        # float32 sums in another order
        assert values["loss"] == pytest.approx(torch.stack(window).mean().item(), rel=1e-5)
        assert values["images"] == 8 * step
        assert values["lr"] == 0.01
        assert values["images_per_second"] > 0
        assert {"terms/u", "diagnostics/gap", "grad_norm", "seconds"} <= values.keys()
        assert all(isinstance(value, float) for value in values.values())


def test_evaluation_runs_when_due_and_at_the_end_and_is_heard() -> None:
    records: list[tuple[dict[str, float], int]] = []
    run(
        budget=Budget(steps=7),
        callbacks=[
            PeriodicEvaluation(fn=lambda state: {"distance": float(state.step)}, every=3),
            MetricsLog(record=lambda values, step: records.append((values, step)), every=100),
        ],
    )
    heard = [(values["distance"], step) for values, step in records if "distance" in values]
    assert heard == [(3.0, 3), (6.0, 6), (7.0, 7)]


def test_evaluation_at_the_end_does_not_repeat_the_last_one() -> None:
    steps: list[int] = []

    def evaluate(state: TrainState) -> dict[str, float]:
        steps.append(state.step)
        return {}

    run(budget=Budget(steps=6), callbacks=[PeriodicEvaluation(fn=evaluate, every=3)])
    assert steps == [3, 6]
    run(budget=Budget(steps=6), callbacks=[PeriodicEvaluation(fn=evaluate), StopAt(2)])
    assert steps == [3, 6]  # nor does a run that was stopped


def test_progress_bar_shows_loss_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(label="toy")

    class Impatient(Callback):
        def on_step(self, state: TrainState, out: LossOutput) -> None:
            bar._shown = -1e9

    with progress.shown():
        run(callbacks=[Impatient(), bar], budget=Budget(steps=4))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("toy  50% step 2, loss ")
    assert "images/s, 0:00:00 left" in lines[1]
    assert lines[-1].startswith("toy 100% step 4")


def test_progress_bar_draws_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.shown():
        run(callbacks=[ProgressBar(label="toy")], budget=Budget(steps=4))
    text = capsys.readouterr().err
    assert "\r" in text
    assert "100%|" in text
    assert "left" in text


def test_progress_bar_is_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    run(callbacks=[ProgressBar(label="toy")])
    assert capsys.readouterr().err == ""


# --- gin


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
