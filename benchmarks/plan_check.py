"""`make plan-check`: what the planner predicts beside real processes; see planning/check.py."""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import os

from benchmarks.markdown import markdown
from benchmarks.planning import check
from benchmarks.planning.check import (
    BUCKET,
    MMAP_THRESHOLD,
    OBJECTIVES,
    STAGES,
    TRIM_THRESHOLD,
    measured,
    predicted,
)
from trainers import ranks
from trainers.zero.engine import ZeroEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=check.__doc__)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--checkpointing", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--dim", type=int, default=448)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument(
        "--bound", type=float, default=0.15, help="largest relative error that passes"
    )
    arguments = parser.parse_args()
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 2**16)
    libc.mallopt(TRIM_THRESHOLD, 0)
    ranks.join()
    rows, worst = [], 0.0
    cases = list(itertools.product(arguments.objectives, arguments.checkpointing, arguments.stages))
    for stage in arguments.stages:  # the first run at a stage loads libraries
        measured(arguments.objectives[0], ZeroEngine(stage=stage), 64, 1, False)
    for name, checkpointing, stage in cases:
        engine = ZeroEngine(
            stage=stage, reduce_bucket_size=BUCKET, gradient_accumulation_steps=arguments.accumulate
        )
        network = (arguments.dim, arguments.depth, bool(checkpointing))
        found = measured(name, engine, *network)
        planned = predicted(name, engine, *network) if ranks.leads() else found
        worst = max(worst, abs(planned / found - 1))
        sizes = [f"{planned / 1e6:.0f} MB", f"{found / 1e6:.0f} MB", f"{planned / found - 1:+.1%}"]
        rows.append([name, "on" if checkpointing else "off", str(stage), *sizes])
        del engine
        gc.collect()
        if ranks.leads():
            print(*rows[-1], flush=True)
    if ranks.leads():
        header = ["objective", "checkpointing", "stage", "predicted", "measured", "error"]
        print(f"\n{markdown(header, rows)}\n\nlargest error {worst:.1%}", flush=True)
    ranks.gathered(None)
    os._exit(worst > arguments.bound)  # DeepSpeed's threads may abort a process that ends by itself


if __name__ == "__main__":
    main()
