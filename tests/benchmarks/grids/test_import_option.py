"""What --import gives is in the text of a run, so that workers and a second run find it."""

from __future__ import annotations

import shlex

import pytest
from tiny_runs import sets, zoo

from benchmarks.records.jsonl import read_record

MINE = """
from dataclasses import dataclass
from registry import schedules

@schedules.register("imported_schedule")
@dataclass(frozen=True, kw_only=True)
class Mine:
    def __call__(self, step, progress):
        return 1.0
"""
TINY = ("mlp.dim = 8", "mlp.depth = 1", "run.steps = 1", "run.batch_size = 8",
        "run.num_samples = 8", "run.nfe = (1,)", "run.recorder = @jsonl()")  # fmt: skip


@pytest.mark.slow  # a worker is a process
def test_workers_find_what_import_gave(tmp_path):
    (tmp_path / "imported_part.py").write_text(MINE)
    (tmp_path / "mine.gin").write_text(
        "include 'experiments/mixture.gin'\nGrid.arms = ('flow_matching',)\n"
    )
    bound = sets(*TINY, "run.schedule = @imported_schedule()")
    given = ("--import", tmp_path / "imported_part.py")
    out = tmp_path / "out"
    done = zoo("grid", tmp_path / "mine.gin", *given, *bound, "--out", out, "--workers", 1)
    assert done.status == 0, done.err
    (run,) = (path.parent for path in out.glob("*/result.json"))
    text = (run / "config.gin").read_text()
    assert "import imported_part" in text
    assert str(tmp_path) in text
    words = shlex.split(read_record(run).tags["cell.command"])
    assert words[words.index("--import") + 1] == str(tmp_path / "imported_part.py")
