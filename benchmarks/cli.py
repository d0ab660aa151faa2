"""The command line: objective-zoo run | grid | list | check | sample | send.

Nothing heavy is imported before the arguments are read, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.request import Request

EXPECTED = (ValueError, KeyError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 1 if a run failed, 2 for a request in error."""
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads our output has enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Given by torch itself at the first forward-mode derivative.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
    arguments = _parser().parse_args(argv)
    arguments.words = ["objective-zoo", *(sys.argv[1:] if argv is None else argv)]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        arguments.command(arguments)
    except BrokenPipeError:
        raise
    except Exception as error:
        if arguments.traceback:
            raise
        from registry.gin_errors import said

        hint = "" if isinstance(error, EXPECTED) else "\nobjective-zoo --traceback ... shows where"
        print(f"error: {said(error)}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        if end.code:
            print(end.code, file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="objective-zoo",
        description="Compare training objectives for one- and few-step generation.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train, sample and measure what a gin file says")
    _add_request(run)
    run.add_argument("--out", type=Path, help="folder of the runs; default runs/NAME-DATE-TIME")
    run.add_argument("--resume", action="store_true", help="continue what is in --out")
    run.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    run.set_defaults(command=_run)

    grid = commands.add_parser("grid", help="run every cell of a gin file's arms and axes")
    _add_request(grid)
    grid.add_argument(
        "--out", type=Path, help="folder of the grid; default runs/NAME; goes on there"
    )
    grid.add_argument("--workers", type=int, help="cells at a time, each in a process of its own")
    grid.add_argument("--dry-run", action="store_true", help="list the cells, estimate the time")
    grid.add_argument("--retry-failed", action="store_true", help="run cells again that failed")
    grid.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    grid.set_defaults(command=_grid)

    listing = commands.add_parser("list", help="every registered part, with its paper")
    listing.add_argument("--kind", help="one kind only, such as objective")
    listing.add_argument("--import", dest="file", type=Path, help="a Python file of your own parts")
    listing.add_argument("--bibtex", action="store_true", help="the references as BibTeX")
    listing.set_defaults(command=_list)

    check = commands.add_parser("check", help="test an objective against closed forms")
    check.add_argument("name", help="a registered objective, such as mean_flow")
    check.add_argument("--import", dest="file", type=Path, help="a Python file of your own parts")
    check.add_argument("--mutations", action="store_true", help="plant mistakes, list what rejects")
    check.add_argument("--json", action="store_true", help="for machines")
    check.set_defaults(command=_check)

    sample = commands.add_parser("sample", help="draw samples from a finished run")
    sample.add_argument("run", type=Path, help="the folder of a finished run")
    sample.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4], help="network evaluations")
    sample.add_argument("--num", type=int, default=64, help="samples per NFE")
    sample.add_argument("--seed", type=int, default=0, help="of the noise")
    sample.add_argument("--sampler", help="a registered sampler; default the run's own")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="the picture to write")
    sample.set_defaults(command=_sample)

    send = commands.add_parser("send", help="send records to MLflow that could not be sent before")
    send.add_argument("folder", type=Path, help="the folder of a run or of a comparison")
    send.add_argument("--tracking-uri", help="default: the store that the run was meant for")
    send.set_defaults(command=_send)
    return parser


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a gin file, such as experiments/digits.gin")
    parser.add_argument("--arm", default="", help="only this arm of the file")
    parser.add_argument(
        "--set", dest="bindings", action="append", default=[], metavar="BINDING",
        help="one more binding, such as 'run.seed = 1'; may be repeated",
    )  # fmt: skip


def _request(arguments: argparse.Namespace) -> Request:
    from benchmarks.request import Request

    bindings = list(arguments.bindings)
    if arguments.tracking_uri:
        bindings.append(f"mlflow.tracking_uri = {arguments.tracking_uri!r}")
    return Request(file=arguments.file, bindings=tuple(bindings), arm=arguments.arm)


def _run(arguments: argparse.Namespace) -> None:
    from benchmarks.comparison import compare

    if arguments.resume and not arguments.out:
        raise ValueError("--resume needs --out, the folder of the runs to continue")
    name = f"{arguments.file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = arguments.out or Path("runs") / name
    again = [] if arguments.out else ["--out", str(out)]
    again = shlex.join([*arguments.words, *again, *([] if arguments.resume else ["--resume"])])
    compare(_request(arguments), out, again=again, resume=arguments.resume)


def _grid(arguments: argparse.Namespace) -> None:
    from benchmarks.comparison import run_grid

    run_grid(
        _request(arguments),
        arguments.out or Path("runs") / arguments.file.stem,
        again=shlex.join(arguments.words),
        workers=arguments.workers,
        retry_failed=arguments.retry_failed,
    )


def _list(arguments: argparse.Namespace) -> None:
    from benchmarks.catalogue import catalogue

    print(catalogue(arguments.kind, arguments.file, bibtex=arguments.bibtex))


def _check(arguments: argparse.Namespace) -> None:
    from benchmarks.conformance import check

    tell = (lambda line: None) if arguments.json else partial(print, flush=True)
    report = check(arguments.name, arguments.file, mutations=arguments.mutations, tell=tell)
    if arguments.json:
        print(report.json())
    if problems := report.problems():
        raise SystemExit(f"{arguments.name} fails: {', '.join(problems)}")


def _sample(arguments: argparse.Namespace) -> None:
    from benchmarks.sampling import sample_run

    where = sample_run(
        arguments.run,
        nfe=tuple(arguments.nfe),
        num=arguments.num,
        seed=arguments.seed,
        sampler=arguments.sampler,
        out=arguments.out,
    )
    print(f"{arguments.num} samples at NFE {', '.join(map(str, arguments.nfe))}: {where}")


def _send(arguments: argparse.Namespace) -> None:
    from benchmarks.mlflow_copy import send

    for folder, state in send(arguments.folder, arguments.tracking_uri):
        print(f"{folder}: {state}")


if __name__ == "__main__":
    sys.exit(main())
