"""One cell in a process of its own; `subprocesses` starts it, people use `objective-zoo run`.

    python -m benchmarks.worker FOLDER [CORES]      CORES such as 0,1

Standard input is a pipe that nobody writes to: when it closes, the process that started this one is
gone, however it died, and this one goes too, with every process that it started. Standard output
carries one line, how the cell ended; whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    folder, *cores = sys.argv[1:]
    if cores:
        os.sched_setaffinity(0, map(int, cores[0].split(",")))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Outside training, where nothing can be saved; training takes both signals itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from benchmarks.cell import run_cell

    ended = run_cell(Path(folder))
    os.write(answer, json.dumps(asdict(ended)).encode())


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
