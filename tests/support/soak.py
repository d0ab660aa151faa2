"""A long run of two processes must grow neither in memory nor in open files: `make soak`.

    python tests/support/soak.py [STAGE [STEPS]]

Tiny steps, an evaluation every 100th, a checkpoint every second (two are kept), a record with its
copy in MLflow. Each process is looked at twice a second. What it holds in the last sixth of the
steps may exceed what it held between a third and a half of them by the bounds below.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from tiny_runs import losses
from zero_runs import Run

# 0.2 MiB were seen; a leak of 10 KiB a step would come to 14.
BOUNDS = {"MiB": 8.0, "files": 3.0, "threads": 2.0}


class Sample(NamedTuple):
    step: int
    held: dict[str, float]


def main() -> int:
    stage, steps = (int(word) for word in (sys.argv[1:] + ["2", "3000"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            Path(folder),
            f"run.steps = {steps}",
            f"zero_engine.stage = {stage}",
            "run.evaluate_every = 100",
            "run.checkpoint_seconds = 1.0",
            "run.recorder = @mlflow()",
            f"mlflow.tracking_uri = 'sqlite:///{folder}/mlflow.db'",
        )
        begun = time.monotonic()
        try:
            seen = watch(run)
        finally:
            run.close()
        if run.process.returncode or len(losses(run.cell)) != steps:
            print(run.output()[-3000:])
            return 1
    print(f"stage {stage}: {steps} steps in {time.monotonic() - begun:.0f} s")
    grown = [told for rank, samples in enumerate(seen) for told in growth(rank, samples, steps)]
    print("\n".join(grown or ["nothing grew"]))
    return 1 if grown else 0


def watch(run: Run) -> list[list[Sample]]:
    """By process, until the run has ended."""
    seen: list[list[Sample]] = []
    while run.alive:
        time.sleep(0.5)
        step = len(losses(run.cell)) if (run.cell / "record.jsonl").exists() else 0
        try:
            held = [_held(process) for process in run.ranks()] if step else []
        except psutil.NoSuchProcess:
            continue
        seen = seen or [[] for _ in held]
        if len(held) < len(seen):  # one has ended, and who is left is not told
            continue
        for samples, now in zip(seen, held, strict=True):
            samples.append(Sample(step, now))
    return seen


def _held(process: psutil.Process) -> dict[str, float]:
    return {
        "MiB": process.memory_info().rss / 2**20,
        "files": process.num_fds(),
        "threads": process.num_threads(),
    }


def growth(rank: int, samples: list[Sample], steps: int) -> list[str]:
    """What exceeds its bound; prints the course of everything."""
    early = [s.held for s in samples if steps / 3 <= s.step < steps / 2]
    late = [s.held for s in samples if s.step >= steps * 5 / 6]
    told = []
    for name, bound in BOUNDS.items():
        sixths: list[list[float]] = [[] for _ in range(6)]
        for s in samples:
            sixths[min(6 * s.step // steps, 5)].append(s.held[name])
        course = ", ".join(f"{statistics.median(part):.0f}" if part else "-" for part in sixths)
        grew = statistics.median(h[name] for h in late) - statistics.median(h[name] for h in early)
        print(f"process {rank}, {name} by sixths of the run: {course}; grew by {grew:.1f}")
        if grew > bound:
            told.append(f"process {rank}: {name} grew by {grew:.1f}, more than {bound:g}")
    return told


if __name__ == "__main__":
    sys.exit(main())
