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
    add_trust(parser)


def add_bindings(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "--set", dest="bindings", action="append", default=[], metavar="BINDING",
        help=f"one more binding, such as {example!r}; may be repeated",
    )  # fmt: skip


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tracking-uri", help="MLflow store; default: mlflow.db beside --out")


def add_rehearsal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-rehearsal", dest="rehearsal", action="store_false",
        help="do not first go through everything at its smallest",
    )  # fmt: skip


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="other weights, such as those of `ema`"
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import", dest="imports", type=Path, action="append", default=[], metavar="FILE",
        help="a Python file of your own parts, imported first; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--trust-code", action="store_true",
        help="import the Python code that a run's folder names, which may do anything",
    )  # fmt: skip


def import_given(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Import the files of --import, after the parts that are installed; the modules' names."""
    from registry.plugins import import_file, load_plugins

    if arguments.imports:
        load_plugins()
    return tuple(import_file(file).__name__ for file in arguments.imports)


def request_of(arguments: argparse.Namespace) -> Request:
    from benchmarks.grids.request import Request

    modules = import_given(arguments)
    bindings = list(arguments.bindings)
    if arguments.tracking_uri:
        bindings.append(f"mlflow.tracking_uri = {arguments.tracking_uri!r}")
    return Request(
        file=arguments.file,
        bindings=tuple(bindings),
        only=tuple(arguments.only),
        trust_code=arguments.trust_code,
        modules=modules,
    )
