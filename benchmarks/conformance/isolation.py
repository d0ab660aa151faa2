"""Claims that a loss depends on nothing but what it is given: rng, batch and the row itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.conformance.claims import evaluate
from benchmarks.conformance.networks import Tapped
from benchmarks.conformance.results import Broken, ClaimResult, compared, declared, held, note
from benchmarks.conformance.subject import STEPS, Subject
from registry.protocols import Share, group_of

SHARE = (
    "draw noise, times and labels for the whole batch, then keep the rows of the share: "
    "x0, x1, t = batch.share.rows(batch.x0, x1, t)"
)


def batch_left_alone(subject: Subject) -> ClaimResult:
    """The loss changes no tensor of the batch, which the trainer may use again."""
    batch = subject.batch(labels="given")
    assert batch.cond is not None
    before = batch.x0.clone(), batch.cond["label"].clone()
    evaluate(subject, batch, "8 rows", "the claims before this one say more")
    changed = [
        name
        for name, old, new in (
            ("batch.x0", before[0], batch.x0),
            ("batch.cond['label']", before[1], batch.cond["label"]),
        )
        if not torch.equal(old, new)
    ]
    if changed:
        raise Broken(
            f"{' and '.join(changed)} changed in place",
            "write x = x * a instead of x *= a or x.mul_(a), and torch.where for labels",
        )
    return held("x0, labels")


def deterministic(subject: Subject) -> ClaimResult:
    """The same rng gives the same loss, also on the same instance; another rng gives another."""
    batch, toy = subject.batch(n=16), subject.on_toy()

    def loss(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        return toy(batch, seed).per_sample.detach()

    with torch.random.fork_rng(devices=[]):
        first, again, elsewhere, other = loss(0, 0), loss(0, 0), loss(0, 1), loss(1, 0)
    if not torch.equal(first, again):
        raise Broken(
            "two calls with the same rng differ",
            "keep no counter or cache in the objective and draw with generator=rng alone, not by "
            "numpy or random; schedules read batch.step",
        )
    if not torch.equal(first, elsewhere):
        raise Broken(
            "torch.manual_seed changes the loss",
            "draw with generator=rng: zoo.ops.normal_like(x, rng), the time laws",
        )
    if torch.equal(first, other):
        raise Broken("the loss ignores rng", "draw noise and times from the rng that is given")
    _check_noise(subject)
    return held("bit-equal")


def global_generators_untouched(subject: Subject) -> ClaimResult:
    """The loss draws from its rng alone, or other objectives would see other data and noise."""
    batch, toy = subject.batch(n=16, labels="given"), subject.on_toy()
    if moved := drawn_from(lambda: toy(batch)):
        raise Broken(
            f"it draws from the global generator of {', '.join(moved)}",
            "draw with generator=rng: zoo.ops.normal_like(x, rng), the time laws",
        )
    return held("torch, numpy, python")


def drawn_from(run: Callable[[], object]) -> list[str]:
    """The global generators from which run() draws."""
    state = random.getstate()
    before = _global_states()
    try:
        run()
        after = _global_states()
    finally:
        random.setstate(state)
    return [name for name, old in before.items() if not np.array_equal(old, after[name])]


def rows_are_independent(subject: Subject) -> ClaimResult:
    """A row's loss does not change with the data of the other rows, or of those of other groups."""
    if subject.couples_rows:
        return declared("couples_rows")
    change, group = 0.0, group_of(subject.make())
    n = _rows_for(group)
    for step in STEPS[:2]:
        for kept in (0, 5, n - 1):
            batch = subject.batch(n=n, step=step)
            x0 = subject.batch(n=n, seed=1).x0
            first = kept - kept % group
            x0[first : first + group] = batch.x0[first : first + group]
            one, two = (
                subject.on_toy()(replace(batch, x0=data), seed=3).per_sample[kept].detach()
                for data in (batch.x0, x0)
            )
            change = max(change, float((one - two).abs() / (one.abs() + 1e-3)))
    return compared(
        "change",
        change,
        1e-9,
        "a row's loss depends on the data of other rows",
        "reduce over elements alone (mean_flat); declare couples_rows = True if it is meant, or "
        "group = k if each k rows in turn are compared with each other alone",
    )


def share_of_a_batch(subject: Subject) -> ClaimResult:
    """A share has the losses that its rows have in the whole batch.

    An objective that ignores the share and computes the whole batch is right, and noted.
    """
    error, wasteful, group = 0.0, False, group_of(subject.make())
    for step in STEPS[:2]:
        batch = subject.batch(n=_rows_for(group), step=step, labels="given")
        whole = subject.on_toy()(batch, seed=step).per_sample.detach()
        for number, count in ((0, 2), (1, 2), (2, 3)):
            share = Share(number, count, group)
            part = subject.on_toy()(replace(batch, share=share), seed=step).per_sample.detach()
            wasteful = part.shape == whole.shape
            wanted = whole if wasteful else share.rows(whole)[0]
            if part.shape != wanted.shape:
                raise Broken(f"{len(part)} losses for {len(wanted)} of {len(batch)} rows", SHARE)
            error = max(error, float(((part - wanted).abs() / (wanted.abs() + 1e-3)).max()))
    if not error < 1e-4:  # float32 times, in other sums
        raise Broken(f"rows have other losses in a share of the batch, by {error:.2g}", SHARE)
    if wasteful:
        return note("computes the whole batch in every share: right, and slow")
    return held(f"change {error:.2g} < 0.0001", error, 1e-4)


def _rows_for(group: int) -> int:
    """12 rows or more, in three groups at least."""
    return max(3, -(-12 // group)) * group


def _check_noise(subject: Subject) -> None:
    """On data that are zero, the states of two steps must not point along the same noise."""
    batch = subject.batch(n=16)
    batch, directions = replace(batch, x0=torch.zeros_like(batch.x0)), []
    for seed in (0, 1):
        toy = subject.on_toy()
        net = Tapped(toy.net, len(batch))
        toy(batch, seed, net=net)
        state = net.calls[0].x.flatten(1)
        directions.append(state / state.norm(dim=1, keepdim=True))
    if len(directions[0]) == len(directions[1]):
        cosine = (directions[0] * directions[1]).sum(1)
        if (cosine > 0.999).all():
            raise Broken("every step has the same noise", "draw x1 = normal_like(batch.x0, rng)")


def _global_states() -> dict[str, np.ndarray]:
    state: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().numpy(),
        "numpy": np.concatenate([state["state"]["key"], [state["state"]["pos"]]]),
        "python": np.array(random.getstate()[1]),
    }
