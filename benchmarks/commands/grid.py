"""objective-zoo grid: every cell of a gin file's arms and axes."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands.arguments import (
    Commands,
    add_rehearsal,
    add_request,
    add_store,
    request_of,
)
from benchmarks.commands.run import goes_on, show


def add_to(commands: Commands) -> None:
    grid = commands.add_parser("grid", help="run every cell of a gin file's arms and axes")
    add_request(grid)
    grid.add_argument(
        "--out", type=Path, help="folder of the grid, new or to be continued; default runs/NAME"
    )
    grid.add_argument("--workers", type=int, help="run this many cells at a time, in processes")
    grid.add_argument("--dry-run", action="store_true", help="list the cells, estimate the time")
    grid.add_argument("--retry-failed", action="store_true", help="run cells again that failed")
    add_rehearsal(grid)
    add_store(grid)
    grid.set_defaults(command=_grid)


def _grid(arguments: argparse.Namespace) -> None:
    from benchmarks.grids.comparison import run_grid
    from benchmarks.grids.dry_run import dry_run
    from benchmarks.grids.outcome import CellsFailed

    request, out = request_of(arguments), arguments.out or Path("runs") / arguments.file.stem
    if arguments.dry_run:
        print(dry_run(request, out, arguments.workers, rehearsal=arguments.rehearsal))
        return
    try:
        show(
            run_grid(
                request,
                out,
                workers=arguments.workers,
                retry_failed=arguments.retry_failed,
                rehearsal=arguments.rehearsal,
            )
        )
    except CellsFailed as failure:
        show(failure.comparison)
        raise SystemExit(str(failure)) from failure
    except KeyboardInterrupt as stop:
        raise goes_on(arguments.words) from stop
