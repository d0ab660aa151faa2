"""What a step costs beside other processes, by how the threads of OpenMP wait for each other.

Each setting trains in a process of its own, since OpenMP reads its variables once. The settings
take turns under each load, so that a change of the machine meets all of them. A load is a number
of processes that compute without a pause.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.threads import SPINS

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default of OpenMP": {},
    **{f"{n} spins": {"GOMP_SPINCOUNT": n} for n in sorted({SPINS, "10000", "50000"}, key=int)},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
_BUSY = "while True: sum(range(10_000))"


def measure(
    seconds: float, turns: int, loads: Sequence[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """For each number of busy processes, milliseconds of a step by setting: medians of turns."""
    for busy in loads:
        with _busy(busy):
            times: dict[str, list[float]] = {name: [] for name in SETTINGS}
            for _ in range(turns):
                for name, variables in SETTINGS.items():
                    times[name].append(_step_in_process(variables, seconds))
        yield busy, {name: statistics.median(values) for name, values in times.items()}


def milliseconds_per_step(seconds: float) -> float:
    """The mean time of a training step of the digits' MeanFlow, over about `seconds`."""
    from benchmarks.grids.request import Request
    from benchmarks.speed.cases import Case

    request = Request(file=Path("experiments/digits.gin"))
    training = Case(request=request, bindings=(), arm="mean_flow", derivative="one_pass").training()
    for _ in range(10):  # to warm up
        training.step()
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        training.step()
        steps += 1
    return 1000 * (time.perf_counter() - started) / steps


def _step_in_process(variables: Mapping[str, str], seconds: float) -> float:
    inherited = {k: v for k, v in os.environ.items() if k not in _VARIABLES}
    words = [sys.executable, "-P", "-m", "benchmarks.waiting", "--one", str(seconds)]
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            words, env={**inherited, **variables}, cwd=folder, check=True, capture_output=True
        )
    return float(json.loads(done.stdout))


@contextmanager
def _busy(processes: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
