"""`python -P -m benchmarks.method_pages`: a page in docs/methods for each method, see pages/."""

from __future__ import annotations

import argparse
from pathlib import Path

FOLDER = Path("docs/methods")
MEASURED = "measured.json"


def main() -> None:
    about = "Write a page for each method, from its code and from what was measured."
    parser = argparse.ArgumentParser(prog="python -P -m benchmarks.method_pages", description=about)
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"folder; default {FOLDER}")
    parser.add_argument(
        "--check", nargs="*", metavar="NAME", help="check these methods first; without a name, all"
    )
    parser.add_argument(
        "--runs", nargs="+", type=Path, default=[], help="take the results of these run folders"
    )
    parser.add_argument("--bench", type=Path, help="take the costs of `objective-zoo bench --json`")
    _write(parser.parse_args())


def _write(given: argparse.Namespace) -> None:
    import dataclasses

    from benchmarks.conformance.report import check
    from benchmarks.pages.index import index_page, methods
    from benchmarks.pages.measured import Measured
    from benchmarks.pages.page import method_page
    from benchmarks.speed.table import Speed
    from registry.plugins import load_plugins

    load_plugins()
    measured = Measured.load(given.out / MEASURED)
    if given.runs:
        measured = measured.with_runs(given.runs)
    if given.bench:
        measured = dataclasses.replace(measured, speed=Speed.load(given.bench))
    names = methods()
    for name in (given.check or names) if given.check is not None else ():
        print(f"objective-zoo check {name}", flush=True)
        measured = measured.with_report(check(name))
        measured.save(given.out / MEASURED)
    measured.save(given.out / MEASURED)
    measured = Measured.load(given.out / MEASURED)  # in the order that later calls will see
    for name in names:
        (given.out / f"{name}.md").write_text(method_page(name, measured))
    (given.out / "README.md").write_text(index_page(measured))
    print(f"{len(names)} pages in {given.out}")


if __name__ == "__main__":
    main()
