"""Cells on a Ray cluster: many machines, or this one.

    Grid.launcher = @ray_cluster()
    ray_cluster.address = 'ray://head:10001'     # 'auto' on a machine of the cluster; '' starts one
    ray_cluster.num_gpus = 1                     # of each cell, as num_cpus

Ray places the cells, and repeats one whose worker or machine dies; it goes on from its checkpoint.
The machines need this version of the project, and must see the folder of the runs, the working
directory and the data under the same paths, by a network file system for example. The folder and
the version are checked before anything runs. Needs `pip install objective-zoo[cluster]`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.console import show_output
from benchmarks.launchers.launcher import OUTPUT, Progress, interruptible
from benchmarks.launchers.subprocesses import Worker
from benchmarks.records.mlflow_sync import reason
from benchmarks.records.provenance import version_of
from registry import launchers
from registry.protocols import Ended, Job, RunCell
from registry.secrets import KEPT

PACKAGE = "objective-zoo"


@launchers.register("ray_cluster")
@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """Runs the cells where a Ray cluster has room; a cell whose worker died runs again.

    With `ranks`, a cell is that many processes on the CPUs and GPUs that it asked for.
    """

    address: str = ""
    num_cpus: float = 1
    num_gpus: float = 0
    ranks: int = 1
    retries: int = 2

    def __post_init__(self) -> None:
        for name, value in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"ray_cluster.{name} = {value!r} must be a number, 0 or more")
        if not (isinstance(self.ranks, int) and self.ranks >= 1):
            raise ValueError(f"ray_cluster.ranks = {self.ranks!r} must be 1 or more")
        if not (isinstance(self.retries, int) and self.retries >= 0):
            raise ValueError(f"ray_cluster.retries = {self.retries!r} must be 0 or more")

    def __call__(self, jobs: Sequence[Job], run_cell: RunCell) -> Iterator[Ended]:
        ray = _import_ray(self.retries)
        try:
            _connect(ray, self.address)
            self._check_machines(ray, [jobs[0].folder.resolve(), Path.cwd()])
            with interruptible() as interrupted:
                yield from self._run(ray, jobs, run_cell, interrupted)
        finally:
            ray.shutdown()
        if interrupted:
            raise KeyboardInterrupt

    def _run(
        self, ray: Any, jobs: Sequence[Job], run_cell: RunCell, interrupted: list[str]
    ) -> Iterator[Ended]:
        task = ray.remote(_run_cell).options(
            num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=self.retries
        )
        environment = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", KEPT))}
        if not self.num_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        where = Path.cwd()
        how = (run_cell, where, environment, self.ranks)
        running = {task.remote(job.folder.resolve(), *how): job for job in jobs}
        progress, cancelled = Progress(), False
        while running:
            if interrupted and not cancelled:
                cancelled = True
                for reference in running:
                    ray.cancel(reference)  # a KeyboardInterrupt in those that run
            for reference in ray.wait(list(running), timeout=0.5)[0]:
                if ended := _ended(ray, reference, running.pop(reference)):
                    yield ended
            progress.tell(job for job in running.values() if (job.folder / OUTPUT).exists())

    def _check_machines(self, ray: Any, paths: Sequence[Path]) -> None:
        """ValueError unless every machine with room for a cell can run it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        wanted = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        machines = [
            node
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(k, 0) >= n for k, n in wanted.items())
        ]
        if not machines:
            raise ValueError(
                f"no machine of the Ray cluster has {self.num_cpus:g} CPUs and {self.num_gpus:g} "
                "GPUs. Lower ray_cluster.num_cpus or num_gpus, or start such a machine"
            )
        task = ray.remote(_trouble)
        answers = []
        for node in machines:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = task.options(num_cpus=0, scheduling_strategy=there)
            answers.append((node["NodeManagerHostname"], ask.remote(paths, version_of(PACKAGE))))
        troubles = [(name, _answer(ray, reference)) for name, reference in answers]
        if refusals := [f"{name} {trouble}" for name, trouble in troubles if trouble]:
            raise ValueError(
                "machines of the Ray cluster cannot run the cells: "
                + "; ".join(refusals)
                + ". They "
                "need the same version of the project, and to see the folders under the same paths"
            )


def _import_ray(retries: int) -> Any:
    # Ray reads this when it starts. Its default repeats a task that ran out of memory for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(retries))
    try:
        import ray
    except ImportError:
        raise ImportError(
            f"ray_cluster needs Ray: pip install '{PACKAGE}[cluster]', on every machine"
        ) from None
    return ray


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address, **quiet)
        else:
            ray.init("local", include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"ray_cluster.address = {address!r}: no Ray cluster answers ({reason(error)}). Start "
            "one with `ray start --head`, or leave the address empty for one of this machine "
            "alone; one that asks for a token needs RAY_AUTH_MODE=token and the token here too"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # which Ray has replaced


def _ended(ray: Any, reference: Any, job: Job) -> Ended | None:
    """How the cell ended; None if it was cancelled before it began."""
    try:
        return ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return None
    except ray.exceptions.RayError as error:
        return Ended(job.name, "failed", f"{reason(error)}; see {job.folder / OUTPUT}")


def _answer(ray: Any, reference: Any) -> str:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return f"cannot import the project ({reason(error)})"


def _trouble(paths: Sequence[Path], version: str) -> str:
    """Runs on a machine of the cluster: why this machine cannot run a cell; '' if it can."""
    if missing := [str(path) for path in paths if not path.exists()]:
        return f"does not see {', '.join(missing)}"
    here = version_of(PACKAGE)
    return "" if here == version else f"has {PACKAGE} {here}, not {version}"


def _run_cell(
    folder: Path, run_cell: RunCell, directory: Path, environment: Mapping[str, str], ranks: int
) -> Ended:
    """Runs on a machine of the cluster: the cell, in the current directory of the grid."""
    if not (folder.exists() and directory.exists()):  # on a machine that joined after the check
        raise FileNotFoundError(f"{os.uname().nodename} does not see {folder} and {directory}")
    os.chdir(directory)
    os.environ.update(environment)
    if ranks > 1:
        return _run_in_ranks(Job(folder.name, folder), run_cell, ranks)
    with (
        open(folder / OUTPUT, "a") as output,
        redirect_stdout(output),
        redirect_stderr(output),
        show_output(),
    ):
        return run_cell(folder)


def _run_in_ranks(job: Job, run_cell: RunCell, ranks: int) -> Ended:
    worker = Worker(job, run_cell, (), ranks, os.environ)
    try:
        while worker.process.poll() is None:
            time.sleep(0.1)  # not wait(): Ray can cancel Python code only
    except KeyboardInterrupt:
        worker.stop()
        worker.process.wait()
    return worker.ended()
