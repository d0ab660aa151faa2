"""`objective-zoo run` in several processes in the background, and waiting for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from tiny_runs import NETWORK, losses, sets

PATIENCE = 300.0  # for a busy machine; the claims below are about time after a fault
BOUND = 60.0  # a fault ends all processes within this: 20 s of grace, the rest is the machine

GIN = """
include 'experiments/digits.gin'
include 'trainer/zero2.gin'
{imports}
run.objective = @dumo()
run.batch_size = 8
run.num_samples = 12
run.nfe = (1, 2)
run.log_every = 1
run.checkpoint_seconds = 0.5
run.metric = @feature_metrics()
feature_metrics.extractor = @pixels()
run.recorder = @jsonl()
"""


class Run:
    """`objective-zoo run` in two processes, in the background."""

    def __init__(
        self,
        folder: Path,
        *bindings: str,
        resume: bool = False,
        imports: str = "",
        ranks: int = 2,
    ):
        self.out, self.log = folder / "out", folder / "log.txt"
        (folder / "tiny.gin").write_text(GIN.format(imports=imports))
        words = ["run", str(folder / "tiny.gin"), "--out", str(self.out)]
        words += ["--launcher", "deepspeed", "--ranks", str(ranks)]
        words += ["--resume"] if resume else []
        words += sets(*NETWORK, *bindings)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cli", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
            stderr=open(self.log, "ab"), start_new_session=True,
        )  # fmt: skip

    @property
    def cell(self) -> Path:
        return self.out / "dumo"

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def trained(self, steps: int) -> bool:
        return (self.cell / "record.jsonl").exists() and len(losses(self.cell)) >= steps

    def output(self) -> str:
        return self.log.read_text()

    def ends(self, within: float) -> int:
        begun = time.monotonic()
        status = self.process.wait(PATIENCE)
        assert time.monotonic() - begun < within, self.output()[-3000:]
        return status

    def close(self) -> None:
        for process in psutil.Process(self.process.pid).children() if self.alive else []:
            process.kill()
        self.process.kill()
        self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def wait_for(event: Callable[[], bool], run: Run) -> None:
    begun = time.monotonic()
    while not event():
        assert run.alive, run.output()[-3000:]
        assert time.monotonic() - begun < PATIENCE, run.output()[-3000:]
        time.sleep(0.1)
