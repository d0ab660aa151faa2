"""Budgets of steps, images and seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_toys import ToyObjective, run

from registry.protocols import Batch, LossOutput
from trainers import (
    Budget,
    PeriodicEvaluation,
    TrainState,
)

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


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


def test_budget_shorter_than_a_step_has_one() -> None:
    state, losses = run(budget=Budget(seconds=1e-9))
    assert (state.step, len(losses)) == (1, 1)


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
