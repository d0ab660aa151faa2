"""The one training loop: batch, loss, update, teachers, callbacks.

Everything random is reseeded from (seed, step), dropout from (seed, share, step), and data,
schedules and averages are functions of the step. So the same seed gives bit-equal losses on the
same machine, and a resumed run continues bit-equal to one that never stopped. Nothing here waits
for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from registry.protocols import (
    Batch,
    Dataset,
    Engine,
    LossOutput,
    Objective,
    Optimizer,
    Schedule,
    Share,
    check_batch,
    check_groups,
    group_of,
    read_share,
    to_device,
)
from trainers import ranks
from trainers.budget import Budget
from trainers.checkpoints import checkpoint
from trainers.devices import check_rows
from trainers.engines import TorchEngine, TrainStep, feature_sha256
from trainers.finite import StopOnNonFinite
from trainers.optim import AdamW, ConstantLr
from trainers.rng import generator, seed_dropout
from trainers.state import Callback, TrainState


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings of one training, for `fit`.

    `ema_decays` and `power_emas` ask for averages of the weights: one for each decay, then one for
    each relative width (trainers/ema). `compile` trains the network, and evaluates its teachers, by
    torch.compile.
    """

    net: nn.Module
    objective: Objective
    dataset: Dataset
    batch_size: int
    budget: Budget
    engine: Engine = field(default_factory=TorchEngine)
    optimizer: Optimizer = AdamW()  # noqa: RUF009  frozen
    schedule: Schedule = ConstantLr()  # noqa: RUF009  frozen
    ema_decays: Sequence[float] = ()
    power_emas: Sequence[float] = ()
    compile: bool = False
    seed: int = 0
    device: torch.device | str = "cpu"

    def train_step(self) -> TrainStep:
        """Network, objective, teachers and averages as one module."""
        return TrainStep(self.net, self.objective, self.ema_decays, self.power_emas)


def fit(
    training: Training | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    folder: Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> TrainState:
    """Train a network in place until the budget is spent or a callback sets `state.stop`.

    What is trained is a Training, or the settings of one: fit(net=..., objective=..., dataset=...,
    batch_size=..., budget=...). `state.emas` are its averages of the weights, in the order of the
    settings; the first is `state.ema_net`. If `callbacks` have no StopOnNonFinite, one is put
    before them. Checkpoints are in `folder`; `resume` continues from the newest one that is whole,
    or starts from the beginning if there is none.
    """
    training = Training(**settings) if training is None else replace(training, **settings)
    state = prepared(training, callbacks, folder)
    if resume:
        checkpoint.restore(state)

    for _ in updates(state, training):
        pass
    return state


def prepared(
    training: Training, callbacks: Sequence[Callback], folder: Path | None = None
) -> TrainState:
    """The state of a run before its first step; the engine is prepared with its network.

    ValueError for a batch that the memory of this machine cannot hold, that is not made of whole
    groups, or that the data set cannot give in groups of one label.
    """
    check_rows("run.batch_size", training.batch_size, training.dataset.shape)
    if (group := group_of(training.objective)) > 1:
        check_batch(training.engine, training.batch_size, group)
        check_groups(training.dataset, group)
    train_step, device = training.train_step(), torch.device(training.device)
    if training.compile:
        train_step.compile_networks()
    features = feature_sha256(training.objective)  # before an engine cuts them into pieces
    training.engine.prepare(train_step, training.optimizer, device, training.batch_size)
    if not any(isinstance(callback, StopOnNonFinite) for callback in callbacks):
        callbacks = (StopOnNonFinite(), *callbacks)
    return TrainState(
        net=train_step.net,
        engine=training.engine,
        budget=training.budget,
        seed=training.seed,
        batch_size=training.batch_size,
        device=device,
        folder=folder,
        callbacks=tuple(callbacks),
        group=group,
        emas=train_step.emas,
        features=features,
    )


def updates(state: TrainState, training: Training) -> Iterator[LossOutput]:
    """Train step by step and yield each step's losses.

    `on_end` is called at the end, and also when the iterator is closed before.
    """
    dataset, lr, schedule = training.dataset, training.optimizer.lr, training.schedule
    with ExitStack() as ends:
        for callback in state.callbacks:
            callback.on_start(state)
            ends.callback(callback.on_end, state)
        state.clock.start()
        state.agree()
        while not (state.budget.done(state) or state.stop):
            out = _update(state, dataset, lr, schedule)
            for callback in state.callbacks:
                callback.on_step(state, out)
            yield out
            state.agree()
        state.clock.stop()
        state.finished = True


def _update(state: TrainState, dataset: Dataset, lr: float, schedule: Schedule) -> LossOutput:
    """One update of the weights from one global batch; returns its losses, detached."""
    engine, step, progress = state.engine, state.step, state.progress
    batch, outs = _read(state, dataset, progress), []
    for share in engine.shares(batch):
        rng = generator(state.seed, 0, step, state.device)
        seed_dropout(state.seed, share.share.number, step, state.device)
        out = engine(share, rng)
        engine.backward(out.per_sample.mean())
        outs.append(replace(out, per_sample=out.per_sample.detach()))

    factor = schedule(step, progress)
    state.lr = lr * factor
    state.grad_norm = engine.step(factor)
    engine.update_averages(step)
    state.step += 1
    state.images += len(batch)
    return outs[0] if len(outs) == 1 else _joined(outs, state.group)


def _read(state: TrainState, dataset: Dataset, progress: float) -> Batch:
    """The global batch on the device; the rows that other processes read are NaN here."""
    step, n, seed = state.step, state.batch_size, state.seed
    mine = Share(ranks.number(), ranks.count(), state.group)
    if mine.count == 1 or state.engine.module.needs_whole:
        whole = read_share(dataset, step, n, seed, Share(group=state.group))
        return _on(state.device, Batch(*whole, step, progress))
    batch = _on(state.device, Batch(*read_share(dataset, step, n, seed, mine), step, progress))
    x0 = batch.x0.new_full((n, *batch.x0.shape[1:]), torch.nan)
    mine.write(batch.x0, x0)
    return replace(batch, x0=x0)


def _on(device: torch.device, batch: Batch) -> Batch:
    cond = to_device(batch.cond, device, non_blocking=True)
    return replace(batch, x0=batch.x0.to(device, non_blocking=True), cond=cond)


def _joined(outs: Sequence[LossOutput], group: int) -> LossOutput:
    """The outputs of all shares as one, rows in the order of the batch."""

    def ordered(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value.unflatten(0, (-1, group)) for value in values], 1).flatten()

    def rows(values: Sequence[Tensor | None]) -> Tensor | None:
        given = [value for value in values if value is not None]
        return ordered(given) if len(given) == len(values) else None

    def named(maps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for values in maps for name in values)
        return {
            name: torch.cat([values[name].reshape(-1) for values in maps if name in values])
            for name in names
        }

    return LossOutput(
        per_sample=ordered([out.per_sample for out in outs]),
        terms=named([out.terms for out in outs]),
        diagnostics=named([out.diagnostics for out in outs]),
        t=rows([out.t for out in outs]),
        r=rows([out.r for out in outs]),
    )
