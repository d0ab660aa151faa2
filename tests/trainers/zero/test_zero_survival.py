"""Runs of two processes that are killed again and again, hang, are pruned, or lose MLflow."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny_runs import entries, losses, zoo
from zero_runs import BOUND, PATIENCE, Run, wait_for

from benchmarks.experiments.pruning import PRUNED
from benchmarks.launchers.ranks import free_port
from benchmarks.records.jsonl import read_record

pytestmark = [pytest.mark.deepspeed, pytest.mark.faults]


@pytest.fixture
def running() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(folder: Path, *bindings: str, **options: object) -> Run:
        folder.mkdir(exist_ok=True)
        runs.append(Run(folder, *bindings, **options))  # type: ignore[arg-type]
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("stage", [2, 3])
def test_run_killed_again_and_again_while_it_saves_ends_as_if_it_never_was(
    stage: int, tmp_path: Path, running: Callable[..., Run]
) -> None:
    """A checkpoint is on its way at nearly every moment; one of three processes dies at random."""
    bindings = ("run.steps = 120", "run.checkpoint_seconds = 0.001", f"zero_engine.stage = {stage}")
    plain = running(tmp_path / "plain", *bindings)
    assert plain.ends(within=PATIENCE) == 0, plain.output()[-3000:]
    rng = random.Random(stage)
    killed = 0
    while killed < 6:
        run = running(tmp_path / "killed", *bindings, resume=killed > 0)
        so_far = len(losses(run.cell)) if killed else 0
        goal = min(so_far + rng.randint(2, 6), 119)
        wait_for(lambda run=run, goal=goal: run.trained(goal), run)
        time.sleep(rng.uniform(0.0, 0.2))
        processes = [psutil.Process(run.process.pid), *run.ranks()]
        rng.choice(processes).send_signal(signal.SIGKILL)
        assert run.ends(within=BOUND) != 0
        assert not psutil.wait_procs(processes, timeout=BOUND)[1]
        killed += 1
    last = running(tmp_path / "killed", *bindings, resume=True)
    assert last.ends(within=PATIENCE) == 0, last.output()[-3000:]
    assert losses(last.cell) == losses(plain.cell)  # bit for bit
    assert len(entries(last.cell, "resume")) == 6
    assert read_values(last) == read_values(plain)


def read_values(run: Run) -> dict[str, float]:
    """What was measured on the weights at the end."""
    last = {k: h.values[-1] for k, h in read_record(run.cell).metrics.items() if "nfe" in k}
    assert last
    return last


@pytest.mark.parametrize("number", [0, 1])
def test_process_that_stops_answering_is_waited_for_as_long_as_bound(
    number: int, tmp_path: Path, running: Callable[..., Run]
) -> None:
    """Also process 0, for which the others would wait in a barrier without a bound."""
    run = running(tmp_path, "run.steps = 100000", "zero_engine.timeout_minutes = 0.25")
    wait_for(lambda: run.trained(3), run)
    stopped = next(p for p in run.ranks() if p.environ()["RANK"] == str(number))
    stopped.send_signal(signal.SIGSTOP)
    assert run.ends(within=15 + BOUND) == 1
    assert "timed out" in run.output().lower()
    assert "Processes wait for each other for zero_engine.timeout_minutes" in run.output()
    assert "--resume" in run.output()
    assert not psutil.wait_procs([stopped], timeout=BOUND)[1]


def test_run_goes_on_without_mlflow_and_its_record_is_sent_later(
    tmp_path: Path, running: Callable[..., Run]
) -> None:
    run = running(
        tmp_path,
        "run.steps = 5",
        "run.recorder = @mlflow()",
        f"mlflow.tracking_uri = 'http://127.0.0.1:{free_port()}'",
        "mlflow.close_seconds = 2",
    )
    assert run.ends(within=PATIENCE) == 0, run.output()[-3000:]
    assert "objective-zoo send" in run.output()
    assert sorted(losses(run.cell)) == [1, 2, 3, 4, 5]
    store = f"sqlite:///{tmp_path / 'late.db'}"
    sent = zoo("send", run.out, "--tracking-uri", store)
    assert sent.status == 0, sent.err
    import mlflow

    found = mlflow.MlflowClient(store).search_runs(["1"])
    curves = [mlflow.MlflowClient(store).get_metric_history(r.info.run_id, "loss") for r in found]
    assert sorted(map(len, curves)) == [0, 5]  # of the comparison, and of its run


PRUNER = """
from dataclasses import dataclass
from registry import pruners

@pruners.register("none_is_good")
@dataclass(frozen=True, kw_only=True)
class NoneIsGood:
    metric: str = "nfe1/fd_pixels"
    min_steps: int = 1

    def __call__(self, reports):
        return True
"""


def test_pruner_of_the_leading_process_ends_all(
    tmp_path: Path, running: Callable[..., Run]
) -> None:
    (tmp_path / "none_is_good.py").write_text(PRUNER)
    run = running(
        tmp_path, "run.steps = 100000", "run.evaluate_every = 3", "run.pruner = @none_is_good()",
        imports="import none_is_good",
    )  # fmt: skip
    assert run.ends(within=PATIENCE) in (0, 1), run.output()[-3000:]
    assert "cannot go on" not in run.output()
    assert "at step 3" in read_record(run.cell).tags[PRUNED]
    assert sorted(losses(run.cell)) == [1, 2, 3]
