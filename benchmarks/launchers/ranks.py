"""Several processes for one command: started here, or by torchrun, the deepspeed launcher or srun.

Every process runs the same command. The leading process does what the command says. The others
follow it: they run each cell that it runs, read the configuration from the cell's folder, and
neither print nor record anything. When one process dies, the others cannot go on: they end within a
bounded time, and `--resume` continues the run.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.threads import NUM_THREADS, threads_of_each
from trainers import ranks

GRACE_SECONDS = 20.0  # that the others have to end after the first one has ended
_PR_SET_PDEATHSIG = 1

log = logging.getLogger(__name__)


def start(
    words: Sequence[str],
    processes: int,
    module: str = "benchmarks.cli",
    again: str = "Continue with --resume",
) -> int:
    """Run `python -m MODULE WORDS` in this many processes of this machine; returns the exit status.

    `again` is logged when a process is lost, and tells how to go on.
    """
    if processes < 1:
        raise ValueError(f"--ranks {processes} must be 1 or more")
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        NUM_THREADS: threads_of_each(processes),
    }
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-P", "-m", module, *words],
                env={**os.environ, **shared, **own},
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        )
    before = {
        number: signal.signal(number, lambda n, _: _send(started, n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return _wait(started, again)
    finally:
        _send(started, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def joined(lead: Callable[[], object], follow: Callable[[], object], words: Sequence[str]) -> None:
    """In one process of several, which were started with `words`: lead, or follow the leader."""
    ranks.join()
    everyones = ranks.gathered(list(words))
    if other := [i for i, theirs in enumerate(everyones) if theirs != everyones[0]]:
        raise ValueError(
            f"process {other[0]} was started with other arguments than process 0:\n"
            f"  {' '.join(everyones[other[0]])}\n  {' '.join(everyones[0])}"
        )
    if not ranks.leads():
        logging.disable(logging.ERROR)
        sys.stderr = open(os.devnull, "w")  # progress; errors go to the original stderr
        follow()
        return
    try:
        lead()
    finally:
        ranks.from_leader(None)


def _wait(started: Sequence[subprocess.Popen[bytes]], again: str) -> int:
    """Wait for all processes; the status of the one that was lost first, or 0."""
    while not any(process.poll() is not None for process in started):
        time.sleep(0.05)
    time.sleep(0.2)  # a process that is lost may take others with it at once
    ended = [(code, i) for i, p in enumerate(started) if (code := p.poll()) is not None]
    first, number = min(ended) if min(ended)[0] < 0 else max(ended)
    if first < 0:
        name = signal.Signals(-first).name
        log.error(
            "process %d of %d was ended by %s; the others end too. %s",
            *(number, len(started), name, again),
        )
    over = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in started) and time.monotonic() < over:
        time.sleep(0.05)
    if left := [i for i, process in enumerate(started) if process.poll() is None]:
        log.error("process %d still waits for one that has ended: ended too. %s", left[0], again)
        _send(started, signal.SIGKILL)
    statuses = [first, *(process.wait() for process in started)]
    status = next((status for status in statuses if status), 0)
    return 128 - status if status < 0 else status


def _send(started: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
