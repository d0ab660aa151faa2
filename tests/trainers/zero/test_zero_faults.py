"""What happens to a run of several processes when something dies, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiny_runs import NETWORK, entries, losses, sets, zoo
from zero_runs import BOUND, GIN, PATIENCE, Run, wait_for

from benchmarks.launchers.ranks import free_port, start
from trainers.checkpoints.checkpoint import checkpoints

pytestmark = pytest.mark.deepspeed


@pytest.fixture
def running() -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*arguments: object, **options: object) -> Run:
        runs.append(Run(*arguments, **options))  # type: ignore[arg-type]
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.faults
def test_killed_process_ends_the_others_and_the_run_resumes_exactly(
    tmp_path: Path, running: Callable[..., Run]
) -> None:
    """Its losses are those of one process that nothing happened to."""
    steps = "run.steps = 60"
    run = running(tmp_path, steps)
    wait_for(lambda: run.trained(5) and bool(checkpoints(run.cell / "checkpoints")), run)
    victim = run.ranks()[1]
    left = run.ranks()[0]
    victim.send_signal(signal.SIGKILL)
    assert run.ends(within=BOUND) == 128 + signal.SIGKILL
    assert "process 1 of 2 was ended by SIGKILL" in run.output()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
    stopped_at = len(losses(run.cell))
    assert stopped_at < 60

    again = running(tmp_path, steps, resume=True)
    assert again.ends(within=PATIENCE) == 0, again.output()[-3000:]
    plain = tmp_path / "plain"
    done = zoo(
        "run", tmp_path / "tiny.gin", "--out", plain,
        *sets(*NETWORK, steps, "run.engine = @torch_engine()", "torch_engine.max_grad_norm = 1.0"),
    )  # fmt: skip
    assert done.status == 0, done.err
    # float32 sums in another order, over 60 steps of Adam
    assert losses(run.cell) == pytest.approx(losses(plain / "dumo"), rel=1e-3)
    assert (run.cell / "deepspeed.json").exists()
    assert len(entries(run.cell, "resume")) == 1  # one run, one record


@pytest.mark.faults
def test_run_goes_on_with_another_number_of_processes_and_another_stage(
    tmp_path: Path, running: Callable[..., Run]
) -> None:
    steps = "run.steps = 60"
    run = running(tmp_path, steps)
    wait_for(lambda: run.trained(3), run)
    run.process.terminate()
    assert run.ends(within=BOUND) == 130
    done = max(losses(run.cell))
    again = running(tmp_path, steps, "zero_engine.stage = 3", resume=True, ranks=1)
    assert again.ends(within=PATIENCE) == 0, again.output()[-3000:]
    assert done < 60 == len(losses(run.cell))
    assert len(entries(run.cell, "resume")) == 1


@pytest.mark.faults
def test_sigterm_to_the_launcher_saves_a_checkpoint(
    tmp_path: Path, running: Callable[..., Run]
) -> None:
    run = running(tmp_path, "run.steps = 100000")
    wait_for(lambda: run.trained(3), run)
    run.process.terminate()
    assert run.ends(within=BOUND) == 130
    (newest,) = checkpoints(run.cell / "checkpoints")[-1:]
    assert int(newest.name.removeprefix("step_")) == max(losses(run.cell))


@pytest.mark.faults
def test_killed_launcher_leaves_no_process(tmp_path: Path, running: Callable[..., Run]) -> None:
    run = running(tmp_path, "run.steps = 100000")
    wait_for(lambda: run.trained(1), run)
    left = run.ranks()
    run.process.kill()
    gone, alive = psutil.wait_procs(left, timeout=BOUND)
    assert len(gone) == 2, alive


@pytest.mark.faults
def test_second_run_in_a_folder_is_refused(tmp_path: Path, running: Callable[..., Run]) -> None:
    run = running(tmp_path, "run.steps = 100000")
    wait_for(lambda: run.trained(1), run)
    second = Run(tmp_path, "run.steps = 100000", resume=True)
    try:
        assert second.ends(within=PATIENCE) == 2
        assert "another process runs" in run.output()
        assert run.alive
    finally:
        second.close()


BAD_ROWS = """
import torch
from dataclasses import dataclass, replace
from registry import objectives
from zoo.objectives.flow_matching import FlowMatching

@objectives.register("bad_rows")
@dataclass(frozen=True, kw_only=True)
class BadRows(FlowMatching):
    def loss(self, net, batch, rng):
        out = super().loss(net, batch, rng)
        bad = torch.zeros(len(batch))
        if batch.step == 9:
            bad[5] = float("nan")
        return replace(out, per_sample=out.per_sample + batch.share.rows(bad)[0])
"""


@pytest.mark.faults
def test_loss_that_is_not_finite_in_one_process_stops_all_and_names_the_row(
    tmp_path: Path, running: Callable[..., Run]
) -> None:
    (tmp_path / "bad_rows.py").write_text(BAD_ROWS)
    run = running(
        tmp_path, "run.steps = 100000", "run.objective = @bad_rows()", imports="import bad_rows"
    )
    assert run.ends(within=PATIENCE) == 1
    assert "step 10: the loss is not finite" in run.output()
    assert "row 5:" in run.output()  # of the global batch; in process 1 it is row 2


FULL_DISK = """
import os, resource, signal
if os.environ.get("RANK") == "1":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
"""


@pytest.mark.faults
def test_full_disk_of_one_process_is_a_warning(tmp_path: Path, running: Callable[..., Run]) -> None:
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    run = running(tmp_path, "run.steps = 30", imports="import full_disk")
    assert run.ends(within=PATIENCE) == 0, run.output()[-3000:]
    assert "NO CHECKPOINT at step" in run.output()
    assert "process 1" in run.output()
    assert checkpoints(run.cell / "checkpoints") == []
    assert (run.cell / "result.json").exists()


def _by_hand(folder: Path, rank: int, port: int, *more: str) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    words = ["run", str(folder / "tiny.gin"), "--out", str(folder / "out")]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cli", *words, *sets(*NETWORK, *more)],
        env={**os.environ, **place, **where}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def _two(folder: Path, wait: float, *bindings: str) -> tuple[list[int], list[str]]:
    """Two processes as torchrun would start them, the second later and with its own bindings."""
    (folder / "tiny.gin").write_text(GIN.format(imports=""))
    port = free_port()
    first = _by_hand(folder, 0, port, bindings[0])
    time.sleep(wait)
    second = _by_hand(folder, 1, port, bindings[1])
    try:
        told = [process.communicate(timeout=PATIENCE)[1] for process in (first, second)]
    finally:
        first.kill()
        second.kill()
    return [first.returncode, second.returncode], told


@pytest.mark.faults
def test_processes_of_any_launcher_make_one_run_and_wait_for_a_late_one(tmp_path: Path) -> None:
    ended, told = _two(tmp_path, 10.0, "run.steps = 3", "run.steps = 3")
    assert ended == [0, 0], told
    assert (tmp_path / "out" / "dumo" / "result.json").exists()
    assert (tmp_path / "out" / "dumo" / "deepspeed.json").exists()
    assert sorted(losses(tmp_path / "out" / "dumo")) == [1, 2, 3]
    assert "dumo finished" in told[0]
    assert "dumo" not in told[1]  # one process speaks


@pytest.mark.faults
def test_process_with_other_words_ends_all(tmp_path: Path) -> None:
    ended, told = _two(tmp_path, 0.0, "run.steps = 3", "run.stesp = 3")
    assert ended == [2, 2], told
    assert all("process 1 was started with other arguments" in text for text in told)
    assert "run.stesp" in told[0]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("subprocesses", marks=pytest.mark.slow),  # half a minute of four processes
        pytest.param("ray_cluster", marks=[pytest.mark.faults, pytest.mark.slow]),
    ],
)
def test_cell_of_a_grid_is_several_processes_where_its_launcher_says_so(
    tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launcher == "ray_cluster":
        pytest.importorskip("ray")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "tiny.gin").write_text(
        GIN.format(imports="")
        + f"Grid.launcher = @{launcher}()\n{launcher}.ranks = 2\n"
        + "Grid.axes = {'run.seed': [0]}\n"
    )
    words = ["grid", tmp_path / "tiny.gin", "--out", tmp_path / "out"]
    done = zoo(*words, *sets(*NETWORK, "run.steps = 3"))
    (cell,) = (tmp_path / "out").glob("*/output.log")
    assert done.status == 0, done.err + cell.read_text()
    config = json.loads((cell.parent / "deepspeed.json").read_text())
    assert config["train_micro_batch_size_per_gpu"] == 4  # half of the batch
    assert sorted(losses(cell.parent)) == [1, 2, 3]


def test_launcher_wants_a_process() -> None:
    with pytest.raises(ValueError, match="--ranks 0 must be 1 or more"):
        start(["run"], 0)


def test_loss_of_a_process_is_told_with_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "dies.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert start([], 2, "dies", again="Ask again") == 128 + signal.SIGKILL
    assert "was ended by SIGKILL; the others end too. Ask again" in caplog.text
