"""What the subcommands share: a gin file with an arm and bindings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from benchmarks.grids.request import Request

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a gin file, such as experiments/digits.gin")
    parser.add_argument(
        "--arm", dest="only", action="append", default=[], metavar="ARM",
        help="only this arm of the file; may be repeated",
    )  # fmt: skip
    add_bindings(parser, "run.seed = 1")


def add_bindings(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set", dest="bindings", action="append", default=[], metavar="BINDING",
        help=f"one more binding, such as {example!r}; may be repeated",
    )  # fmt: skip


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")


def add_rehearsal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-rehearsal", dest="rehearsal", action="store_false",
        help="do not first go through everything at its smallest",
    )  # fmt: skip


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="other weights, such as those of `ema`"
    )


def request_of(arguments: argparse.Namespace) -> Request:
    from benchmarks.grids.request import Request

    bindings = list(arguments.bindings)
    if arguments.tracking_uri:
        bindings.append(f"mlflow.tracking_uri = {arguments.tracking_uri!r}")
    return Request(file=arguments.file, bindings=tuple(bindings), only=tuple(arguments.only))
