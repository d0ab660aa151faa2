"""Callbacks: logs, evaluations and the progress bar."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from trainer_toys import StopAt, run

from registry import progress
from registry.protocols import LossOutput
from trainers import (
    Budget,
    Callback,
    MetricsLog,
    PeriodicEvaluation,
    ProgressBar,
    TrainState,
)

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


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

    with progress.show_progress():
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
    with progress.show_progress():
        run(callbacks=[ProgressBar(label="toy")], budget=Budget(steps=4))
    text = capsys.readouterr().err
    assert "\r" in text
    assert "100%|" in text
    assert "left" in text


def test_progress_bar_is_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    run(callbacks=[ProgressBar(label="toy")])
    assert capsys.readouterr().err == ""
