"""Where cells run: which start when, how they end, and that none is left behind.

Most cells here are scripts that stand in for a training (cell_scripts.py); they print nothing but
what they are told to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cell_scripts
import pytest
from cell_scripts import run_cell
from tiny_runs import entries

from benchmarks.launchers import launcher, subprocesses
from benchmarks.launchers.launcher import OUTPUT, InProcess, close_lost
from benchmarks.launchers.subprocesses import Subprocesses
from benchmarks.records.jsonl import read_record
from benchmarks.records.recorders import Jsonl
from benchmarks.runs.result import Result
from benchmarks.threads import core_numbers
from registry.protocols import Ended, Job

WAITS = """
import time
(folder / "started").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    (folder / "saved").touch()
    ended = Ended(name, "stopped", "by a signal")
"""
NOTES_TIME = """
import time
(folder / "began").write_text(repr(time.monotonic()))
while len(list(folder.parent.glob("*/began"))) < 2:  # so that the first two meet
    time.sleep(0.02)
time.sleep(0.1)
(folder / "done").write_text(repr(time.monotonic()))
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Job]]:
    """Makes a job of each script, in folders a, b, c, ..."""
    where = str(Path(cell_scripts.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", where, prepend=os.pathsep)  # where workers find `run_cell`
    monkeypatch.setattr(subprocesses, "_gpus", list)  # asking torch takes seconds

    def make(*scripts: str) -> list[Job]:
        made = []
        for name, script in zip("abcdefgh"[: len(scripts)], scripts, strict=True):
            (tmp_path / name).mkdir()
            (tmp_path / name / "script.py").write_text(textwrap.dedent(script))
            made.append(Job(name, tmp_path / name))
        return made

    return make


def wait_for(claim: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether no such process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_cells_run_in_order_and_end_with_the_first_that_is_stopped() -> None:
    ran = []

    def run(folder: Path) -> Ended:
        ran.append(folder.name)
        return Ended(folder.name, {"a": "failed", "b": "stopped"}[folder.name])

    seen: list[Ended] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(InProcess()([Job(name, Path(name)) for name in "abc"], run))
    assert ran == ["a", "b"]
    assert seen == [Ended("a", "failed"), Ended("b", "stopped")]


def test_workers_answer_how_their_cells_ended(jobs: Callable[..., list[Job]]) -> None:
    told = list(
        Subprocesses(workers=2)(
            jobs(
                "print('printed')",
                "ended = Ended(name, 'failed', 'loss is not finite')",
                "ended = Ended(name, 'pruned', 'at step 3')",
            ),
            run_cell,
        )
    )
    assert sorted(told, key=lambda ended: ended.name) == [
        Ended("a", "finished"),
        Ended("b", "failed", "loss is not finite"),
        Ended("c", "pruned", "at step 3"),
    ]


def test_output_of_a_cell_is_kept_in_its_folder(jobs: Callable[..., list[Job]]) -> None:
    script = "import os, sys; print('out'); print('err', file=sys.stderr); os.system('echo child')"
    (job,) = jobs(script)
    (job.folder / OUTPUT).write_text("before\n")
    assert list(Subprocesses(workers=1)([job], run_cell)) == [Ended("a", "finished")]
    lines = (job.folder / OUTPUT).read_text().split()
    assert lines[0] == "before"
    assert sorted(lines[1:]) == ["child", "err", "out"]


def test_no_more_cells_run_at_once_than_there_are_workers(jobs: Callable[..., list[Job]]) -> None:
    started = jobs(*[NOTES_TIME] * 5)
    list(Subprocesses(workers=2)(started, run_cell))
    spans = [[float((j.folder / f).read_text()) for f in ("began", "done")] for j in started]
    at_once = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(at_once) == 2


@pytest.mark.skipif(len(core_numbers()) < 2, reason="needs two cores")
def test_workers_divide_the_cores_between_them(
    jobs: Callable[..., list[Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = """
        import os, time
        threads = [os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")]
        (folder / "has").write_text(f"{sorted(os.sched_getaffinity(0))} {threads}")
        time.sleep(1)  # both at once
    """
    started = jobs(script, script)
    list(Subprocesses(workers=2)(started, run_cell))
    cores = core_numbers()
    half = len(cores) // 2
    threads = [str(half)] * 3
    assert {(job.folder / "has").read_text() for job in started} == {
        f"{cores[:half]} {threads}",
        f"{cores[half : 2 * half]} {threads}",
    }


@pytest.mark.parametrize(
    ("items", "workers", "shares"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3]]),
        ([4, 7], 3, [[4], [7], [4]]),
        ([5], 1, [[5]]),
    ],
)
def test_shares_are_disjoint_while_they_last(
    items: list[int], workers: int, shares: list[list[int]]
) -> None:
    assert [subprocesses._share(items, place, workers) for place in range(workers)] == shares


def test_fewer_threads_asked_for_in_the_environment_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocesses, "_gpus", lambda: ["2", "5"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "64")
    made = subprocesses._environment(4, 1, 2)
    assert (made["OMP_NUM_THREADS"], made["MKL_NUM_THREADS"]) == ("1", "4")
    assert made["CUDA_VISIBLE_DEVICES"] == "5"


def test_function_that_no_other_process_can_find_is_refused(
    jobs: Callable[..., list[Job]],
) -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        list(Subprocesses(workers=1)(jobs(""), lambda folder: Ended(folder.name, "finished")))


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2"])
def test_number_of_workers_is_checked_at_construction(workers: Any) -> None:
    with pytest.raises(ValueError, match=r"subprocesses\.workers"):
        Subprocesses(workers=workers)


def test_killed_worker_fails_with_the_signal_named_and_the_others_go_on(
    jobs: Callable[..., list[Job]],
) -> None:
    started = jobs("import os; os.kill(os.getpid(), 9)", "raise SystemExit(7)", "")
    told = {ended.name: ended for ended in Subprocesses(workers=1)(started, run_cell)}
    assert {name: ended.status for name, ended in told.items()} == {
        "a": "failed",
        "b": "failed",
        "c": "finished",
    }
    assert "SIGKILL" in told["a"].reason
    assert "memory" in told["a"].reason
    assert "exit status 7" in told["b"].reason
    assert str(started[0].folder / OUTPUT) in told["a"].reason


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_running_cells_save_and_starts_no_more(
    jobs: Callable[..., list[Job]], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    started = jobs(WAITS, WAITS, WAITS)

    def interrupt() -> None:
        wait_for(lambda: all((job.folder / "started").exists() for job in started[:2]))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    seen: list[Ended] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(Subprocesses(workers=2)(started, run_cell))
    thread.join()
    assert sorted(ended.name for ended in seen) == ["a", "b"]
    assert {ended.status for ended in seen} == {"stopped"}
    assert (started[0].folder / "saved").exists()
    assert (started[1].folder / "saved").exists()
    assert not (started[2].folder / "started").exists()
    assert signal.getsignal(number) is before


def pids_of(job: Job) -> list[int]:
    return [int(pid) for pid in (job.folder / "pids").read_text().split()]


LEAVES_A_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
(folder / "pids").write_text(f"{os.getpid()} {child.pid}")
(folder / "started").touch()
"""


def test_killed_parent_takes_its_workers_and_theirs_along(jobs: Callable[..., list[Job]]) -> None:
    (job,) = jobs(LEAVES_A_CHILD + "time.sleep(60)")
    code = """
import sys
from pathlib import Path
from benchmarks.launchers import subprocesses
from registry.protocols import Job
import cell_scripts
from cell_scripts import run_cell
subprocesses._gpus = list
list(subprocesses.Subprocesses(workers=1)([Job("a", Path(sys.argv[1]))], run_cell))
"""
    words = [sys.executable, "-c", code, str(job.folder)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as parent:
        wait_for((job.folder / "started").exists)
        assert not any(map(gone, pids_of(job)))
        parent.kill()
    wait_for(lambda: all(map(gone, pids_of(job))), 5)


def test_leaving_early_kills_what_runs(jobs: Callable[..., list[Job]]) -> None:
    started = jobs("", LEAVES_A_CHILD + "time.sleep(60)")
    run = Subprocesses(workers=2)(started, run_cell)
    assert next(run).name == "a"
    wait_for((started[1].folder / "started").exists)
    run.close()
    wait_for(lambda: all(map(gone, pids_of(started[1]))), 5)


def test_child_that_a_cell_leaves_behind_is_killed(jobs: Callable[..., list[Job]]) -> None:
    (job,) = jobs(LEAVES_A_CHILD)
    assert list(Subprocesses(workers=1)([job], run_cell)) == [Ended("a", "finished")]
    wait_for(lambda: all(map(gone, pids_of(job))), 5)


def test_progress_tells_where_the_output_is_and_then_its_last_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "benchmarks")
    job = Job("a", tmp_path)
    progress = launcher.Progress()
    progress.tell([job])
    progress.tell([job])
    assert caplog.messages == [f"  a runs; its output is in {tmp_path / OUTPUT}"]
    monkeypatch.setattr(launcher, "TELL_SECONDS", -1.0)
    (tmp_path / OUTPUT).write_text("")
    progress.tell([job])
    (tmp_path / OUTPUT).write_text("x\n" * 2000 + "  a  40% step 4\n")
    progress.tell([job])
    assert caplog.messages[1:] == ["  a: has printed nothing yet", "  a: a  40% step 4"]


def test_record_of_a_killed_cell_is_closed_with_the_reason(tmp_path: Path) -> None:
    with Jsonl().start("grid", tmp_path) as parent:
        parent.child("a", tmp_path / "a").metrics({"loss": 1.0}, 3)
        close_lost(Job("a", tmp_path / "a"), "killed by SIGKILL", parent)
        record = read_record(tmp_path / "a")
        assert (record.status, record.tags["error"]) == ("FAILED", "killed by SIGKILL")
        assert record.metrics["loss"].steps.tolist() == [3]
        assert record.parent == parent.id


def test_record_that_is_closed_or_was_never_begun_is_left_alone(tmp_path: Path) -> None:
    with Jsonl().start("grid", tmp_path) as parent:
        parent.child("a", tmp_path / "a").close()
        lines = (tmp_path / "a" / "record.jsonl").read_bytes()
        close_lost(Job("a", tmp_path / "a"), "killed by SIGKILL", parent)
        close_lost(Job("b", tmp_path / "b"), "killed by SIGKILL", parent)
    assert (tmp_path / "a" / "record.jsonl").read_bytes() == lines
    assert not (tmp_path / "b").exists()


GRID = """
include 'experiments/mixture.gin'
flow/run.objective = @flow_matching()
mean/run.objective = @mean_flow()
Grid.arms = ('flow', 'mean')
Grid.repeat = {'run.seed': [0]}
run.steps = 400
run.batch_size = 32
run.num_samples = 16
run.nfe = (1,)
run.checkpoint_seconds = 0.2
run.recorder = @jsonl()
"""


def worker_of(folder: Path) -> int:
    """The process that runs the cell in a folder; 0 where there is none."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"benchmarks.worker" in words and str(folder).encode() in words:
                return int(process.name)
    return 0


@pytest.mark.slow
def test_grid_goes_on_after_kill_9_of_a_worker_and_of_itself(tmp_path: Path) -> None:
    (tmp_path / "grid.gin").write_text(GRID)

    def grid(out: str, *more: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "benchmarks.cli", "grid", tmp_path / "grid.gin"]
        return subprocess.Popen([*words, "--workers", "2", "--out", tmp_path / out, *more])

    assert grid("whole").wait(500) == 0
    whole = sorted((tmp_path / "whole").glob("*/result.json"))
    assert len(whole) == 2

    broken = grid("out")
    first, second = (tmp_path / "out" / path.parent.name for path in whole)
    wait_for(lambda: all(any((f / "checkpoints").glob("*")) for f in (first, second)), 200)
    os.kill(worker_of(first), signal.SIGKILL)
    wait_for(lambda: read_record(first).status == "FAILED", 60)
    assert "SIGKILL" in read_record(first).tags["error"]
    assert worker_of(second)
    broken.kill()
    broken.wait()
    wait_for(lambda: not worker_of(second), 10)

    assert grid("out", "--retry-failed").wait(500) == 0
    for path in whole:
        there = tmp_path / "out" / path.parent.name
        assert Result.load(there).values == Result.load(path.parent).values
        assert len(entries(there, "resume")) >= 1
        assert read_record(there).status == "FINISHED"
