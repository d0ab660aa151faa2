"""Tasks in worker processes: where they are done, what is told, and whose code they run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.latents.process_pool import outcomes

ROOT = Path(__file__).parents[3]
SCRIPT = """
from benchmarks.latents import process_pool

def work(task, device, threads, tell):
    tell(1)
    if task == "bad":
        raise ValueError("this task fails")
    return task, device, process_pool.__file__

if __name__ == "__main__":
    told = []
    tasks = ["a", "b", "bad"]
    for task, outcome in process_pool.outcomes(work, tasks, 2, ["cpu", "meta"], told.append):
        try:
            print(*outcome())
        except ValueError as error:
            print(task, error)
    print(sum(told))
"""


def test_one_worker_is_this_process():
    told = []

    def work(task, device, threads, tell):
        tell(task)
        return task * 10, device

    found = [(task, outcome()) for task, outcome in outcomes(work, [1, 2], 1, ["cpu"], told.append)]
    assert found == [(1, (10, "cpu")), (2, (20, "cpu"))]
    assert told == [1, 2]


@pytest.mark.slow  # two processes import torch
def test_workers_take_no_folder_of_the_current_directory_for_ours(tmp_path):
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "main.py").write_text(SCRIPT)
    (tmp_path / "here" / "benchmarks").mkdir(parents=True)
    (tmp_path / "here" / "benchmarks" / "__init__.py").write_text("raise SystemExit('not ours')")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script" / "main.py")],
        cwd=tmp_path / "here",
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    *lines, told = done.stdout.splitlines()
    ours = ROOT / "benchmarks" / "latents" / "process_pool.py"
    assert {line.split()[0]: line.split()[-1] for line in lines} == {
        "a": str(ours),
        "b": str(ours),
        "bad": "fails",
    }, done.stderr
    assert told == "3"
