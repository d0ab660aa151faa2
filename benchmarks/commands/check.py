"""objective-zoo check, and list: the registered parts, and one part against its contract."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from benchmarks.commands.arguments import Commands, add_bindings


def add_to(commands: Commands) -> None:
    listing = commands.add_parser("list", help="every registered part, with its paper")
    listing.add_argument("--kind", help="one kind only, such as objective")
    listing.add_argument("--import", dest="file", type=Path, help="a Python file of your own parts")
    listing.add_argument("--bibtex", action="store_true", help="the references as BibTeX")
    listing.set_defaults(command=_list)

    check = commands.add_parser(
        "check", help="test an objective against closed forms, or another part against its contract"
    )
    check.add_argument("name", help="a registered part, such as mean_flow, trigflow or digits")
    check.add_argument("--kind", help="which part, where several have the name, such as path")
    check.add_argument("--import", dest="file", type=Path, help="a Python file of your own parts")
    add_bindings(check, "dumo.omega = 0.5")
    check.add_argument(
        "--mutations", action="store_true", help="plant mistakes, list who finds them"
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(command=_check)


def _list(arguments: argparse.Namespace) -> None:
    from registry.catalogue import catalogue

    print(catalogue(arguments.kind, arguments.file, bibtex=arguments.bibtex))


def _check(arguments: argparse.Namespace) -> None:
    from benchmarks.conformance import check

    tell = (lambda line: None) if arguments.json else partial(print, flush=True)
    report = check(
        arguments.name,
        arguments.file,
        kind=arguments.kind,
        bindings=arguments.bindings,
        mutations=arguments.mutations,
        tell=tell,
    )
    if arguments.json:
        print(report.json())
    if problems := report.problems():
        raise SystemExit(f"{report.objective} fails: {', '.join(problems)}")
