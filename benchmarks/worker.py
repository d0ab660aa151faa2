"""Runs one cell in a process of its own, or in several; a launcher starts it, not a person.

    python -P -m benchmarks.worker FOLDER CORES RANKS MODULE:FUNCTION

CORES are numbers such as 0,1, or '' for all; the function runs the cell in FOLDER and says how it
ended. -P keeps a folder `benchmarks` of the current directory from being taken for this package.

Standard input is a pipe that nobody writes to: when it closes, the process that started this one
has ended, however it died, and this one ends too, with every process that it started. Standard
output carries one line, how the cell ended; whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path

from benchmarks.threads import choose_threads


def main() -> None:
    folder, cores, processes, address = sys.argv[1:]
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    choose_threads()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if int(processes) > 1 and "RANK" not in os.environ:
        from benchmarks.launchers.ranks import start

        sys.exit(start(sys.argv[1:], int(processes), "benchmarks.worker"))
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Outside training, where nothing can be saved; training takes both signals itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from benchmarks.console import show_output

    run_cell = pkgutil.resolve_name(address)

    def lead() -> None:
        with show_output():
            ended = run_cell(Path(folder))
        os.write(answer, json.dumps(asdict(ended)).encode())

    if "RANK" not in os.environ:
        return lead()
    from benchmarks.grids.cell import follow
    from benchmarks.launchers.ranks import joined

    joined(lead, follow, [folder])
    os._exit(0)  # DeepSpeed's threads may abort a normal exit


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
