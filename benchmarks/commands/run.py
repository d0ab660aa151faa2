"""run, grid and sample."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from functools import partial
from pathlib import Path

from benchmarks.commands.arguments import (
    Commands,
    add_bindings,
    add_request,
    add_weights,
    request_of,
)
from benchmarks.launchers.slurm import take_place


def add_to(commands: Commands) -> None:
    run = commands.add_parser("run", help="train, sample and measure what a gin file says")
    add_request(run)
    run.add_argument("--out", type=Path, help="folder of the runs; default runs/NAME-DATE-TIME")
    run.add_argument("--resume", action="store_true", help="continue what is in --out")
    run.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    run.add_argument(
        "--launcher", choices=("deepspeed",), help="in processes of this machine; see --ranks"
    )
    run.add_argument("--ranks", type=int, default=1, help="how many processes, one per GPU")
    run.add_argument("--smoke", action="store_true", help="a recipe at 1/1000 of its size")
    run.set_defaults(command=_run)

    grid = commands.add_parser("grid", help="run every cell of a gin file's arms and axes")
    add_request(grid)
    grid.add_argument(
        "--out", type=Path, help="folder of the grid; default runs/NAME; goes on there"
    )
    grid.add_argument("--workers", type=int, help="cells at a time, each in a process of its own")
    grid.add_argument("--dry-run", action="store_true", help="list the cells, estimate the time")
    grid.add_argument("--retry-failed", action="store_true", help="run cells again that failed")
    grid.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    grid.set_defaults(command=_grid)

    sample = commands.add_parser("sample", help="draw samples from a finished run")
    sample.add_argument("run", type=Path, help="the folder of a finished run")
    sample.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4], help="network evaluations")
    sample.add_argument("--num", type=int, default=64, help="samples per NFE")
    sample.add_argument("--seed", type=int, default=0, help="of the noise")
    sample.add_argument("--sampler", help="a registered sampler; default the run's own")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="the picture to write")
    add_weights(sample)
    add_bindings(sample, "euler.shift = 2.0")
    sample.set_defaults(command=_sample)


def _run(arguments: argparse.Namespace) -> None:
    from benchmarks.grids.comparison import compare

    if arguments.resume and not arguments.out:
        raise ValueError("--resume needs --out, the folder of the runs to continue")
    if take_place(os.environ) and arguments.launcher:
        raise ValueError(
            f"srun started {os.environ['WORLD_SIZE']} processes already; leave --launcher out"
        )
    from trainers import ranks

    name = f"{arguments.file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = arguments.out or Path("runs") / name
    request = request_of(arguments)
    if arguments.smoke:  # before processes start, which find the data made
        from benchmarks.commands.smoke import shrunken

        request = shrunken(request, out.with_name(f"{out.name}-data"))
    if arguments.launcher and not ranks.launched():
        return _launch(arguments, out)
    words = [*arguments.words, *([] if arguments.out else ["--out", str(out)])]
    again = shlex.join([*words, *([] if arguments.resume else ["--resume"])])
    lead = partial(compare, request, out, again=again, resume=arguments.resume)
    if ranks.launched():
        from benchmarks.grids.cell import follow
        from benchmarks.launchers.ranks import joined

        return joined(lead, follow, arguments.words)
    lead()
    if arguments.smoke:
        from benchmarks.report import write_report

        write_report([out], out / "report")
        print(f"report    {out / 'report' / 'report.html'}")


def _launch(arguments: argparse.Namespace, out: Path) -> None:
    from benchmarks.launchers.ranks import start

    words = arguments.words[1:] + ([] if arguments.out else ["--out", str(out)])
    if status := start(words, arguments.ranks):
        raise SystemExit(status)


def _grid(arguments: argparse.Namespace) -> None:
    from benchmarks.grids.comparison import run_grid
    from benchmarks.grids.dry_run import dry_run

    request, out = request_of(arguments), arguments.out or Path("runs") / arguments.file.stem
    if arguments.dry_run:
        return dry_run(request, out, arguments.workers)
    run_grid(
        request,
        out,
        again=shlex.join(arguments.words),
        workers=arguments.workers,
        retry_failed=arguments.retry_failed,
    )


def _sample(arguments: argparse.Namespace) -> None:
    from benchmarks.runs.finished import sample_run

    where = sample_run(
        arguments.run,
        nfe=tuple(arguments.nfe),
        num=arguments.num,
        seed=arguments.seed,
        sampler=arguments.sampler,
        out=arguments.out,
        weights=arguments.weights,
        bindings=tuple(arguments.bindings),
    )
    print(f"{arguments.num} samples at NFE {', '.join(map(str, arguments.nfe))}: {where}")
