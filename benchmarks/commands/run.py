"""objective-zoo run: train, sample and measure what a gin file says."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.commands.arguments import (
    Commands,
    add_rehearsal,
    add_request,
    add_store,
    request_of,
)
from benchmarks.launchers.slurm import take_place

if TYPE_CHECKING:
    from benchmarks.grids.outcome import ComparisonOutcome


def add_to(commands: Commands) -> None:
    run = commands.add_parser("run", help="train, sample and measure what a gin file says")
    add_request(run)
    run.add_argument("--out", type=Path, help="folder of the runs; default runs/NAME-DATE-TIME")
    run.add_argument("--resume", action="store_true", help="continue what is in --out")
    run.add_argument(
        "--fork", type=Path, metavar="DIR",
        help="start new runs in --out from the newest checkpoints in DIR, with other settings",
    )  # fmt: skip
    add_rehearsal(run)
    add_store(run)
    run.add_argument(
        "--ranks", type=int, default=1, help="run in this many processes of this machine"
    )
    run.add_argument("--launcher", choices=("deepspeed",), help=argparse.SUPPRESS)
    run.add_argument("--smoke", action="store_true", help="run a recipe at 1/1000 of its size")
    run.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.resume and not arguments.out:
        raise ValueError("--resume needs --out, the folder of the runs to continue")
    started_by_srun = take_place(os.environ)
    from trainers import ranks

    _check_processes(arguments, "srun" if started_by_srun else "a launcher")
    name = f"{arguments.file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = arguments.out or Path("runs") / name
    request = request_of(arguments)
    if arguments.smoke:  # before processes start, which find the data made
        from benchmarks.commands.smoke import shrunken

        request = shrunken(request, out.with_name(f"{out.name}-data"))
    words = [*arguments.words, *([] if arguments.out else ["--out", str(out)])]
    if arguments.ranks > 1 and not ranks.launched():
        from benchmarks.launchers.ranks import start

        request.parse(troubles=[])  # keeps secrets in the environment, for the processes to find
        if status := start(words[1:], arguments.ranks):
            raise SystemExit(status)
        return
    from benchmarks.grids.comparison import compare
    from benchmarks.grids.outcome import CellsFailed

    def lead() -> None:
        try:
            show(
                compare(
                    request, out,
                    resume=arguments.resume, fork=arguments.fork, rehearsal=arguments.rehearsal,
                )
            )  # fmt: skip
        except CellsFailed as failure:
            show(failure.comparison)
            raise SystemExit(str(failure)) from failure
        except KeyboardInterrupt as stop:
            again = [*words, *([] if arguments.resume else ["--resume"])]
            raise goes_on(again) from stop

    if ranks.launched():
        from benchmarks.grids.cell import follow
        from benchmarks.launchers.ranks import joined

        return joined(lead, follow, arguments.words)
    lead()
    if arguments.smoke:
        from benchmarks.report import write_report

        write_report([out], out / "report")
        print(f"report    {out / 'report' / 'report.html'}")


def _check_processes(arguments: argparse.Namespace, launcher: str) -> None:
    """ValueError where --ranks contradicts the processes that were started already."""
    if arguments.ranks < 1:
        raise ValueError(f"--ranks {arguments.ranks} must be 1 or more")
    started = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    if started and arguments.ranks > 1 and arguments.ranks != int(started):
        raise ValueError(
            f"{launcher} started {started} processes already; leave --ranks {arguments.ranks} out"
        )


def show(comparison: ComparisonOutcome) -> None:
    """Print the table and where everything is."""
    out = comparison.folder
    if text := comparison.text():
        print(f"\n{text}")
    print(f"\n{comparison.seconds / 60:.1f} minutes")
    print(f"table     {out / 'table.md'}")
    if (out / "samples.png").exists():
        print(f"samples   {out / 'samples.png'}")
    print(f"gin text  {out}/*/config.gin, operative.gin")
    if store := comparison.store:
        print(f"records   {store.name}; open them with\n          {store.open_hint()}")


def goes_on(words: list[str]) -> KeyboardInterrupt:
    """The last lines of a stopped command, with the command that continues it."""
    return KeyboardInterrupt(f"stopped; continue with\n    {shlex.join(words)}")
