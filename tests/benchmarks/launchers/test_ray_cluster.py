"""Cells on a Ray cluster that the tests start on this machine; scripts stand in for the cells."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cell_scripts
import pytest
from cell_scripts import run_whole_cell

from benchmarks.launchers.launcher import OUTPUT
from benchmarks.launchers.ray_cluster import RayCluster
from registry.protocols import Ended, Job

DIES_ONCE = """
import os
tries = folder / "tries"
tries.write_text((tries.read_text() if tries.exists() else "") + "x")
if len(tries.read_text()) == 1:
    os.kill(os.getpid(), 9)
"""
DIES = "import os; os.kill(os.getpid(), 9)"
LOOKS_ABOUT = """
import os, sys
print("printed")
print("complained", file=sys.stderr)
seen = (os.getcwd(), os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("CUDA_VISIBLE_DEVICES"))
(folder / "seen").write_text(repr(seen))
"""
WAITS = """
import time
(folder / "started").touch()
try:
    for _ in range(600):
        time.sleep(0.1)  # Ray's interrupt comes between two steps, it does not end a long call
except KeyboardInterrupt:
    (folder / "saved").touch()
    ended = Ended(name, "stopped", "by a signal")
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Job]]:
    """Makes a job of each script, in folders a, b, c, ...; skips where Ray is not installed."""
    pytest.importorskip("ray", reason="Ray is an extra: pip install objective-zoo[cluster]")
    where = str(Path(cell_scripts.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", where, prepend=os.pathsep)  # where workers find `run_cell`

    def make(*scripts: str) -> list[Job]:
        made = []
        for name, script in zip("abcdefgh"[: len(scripts)], scripts, strict=True):
            (tmp_path / name).mkdir()
            (tmp_path / name / "script.py").write_text(script)
            made.append(Job(name, tmp_path / name))
        return made

    return make


@pytest.fixture
def head(jobs: Callable[..., list[Job]], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of one machine that is there already; its address for clients."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    port, client = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:  # short: Ray's sockets are in it
        words = ["start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}"]
        words += [f"--ray-client-server-port={client}", "--num-cpus=2", "--disable-usage-stats"]
        words += ["--include-dashboard=false", "--min-worker-port=0", "--max-worker-port=0"]
        with subprocess.Popen(
            [Path(sys.executable).with_name("ray"), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                yield f"ray://127.0.0.1:{client}"
            finally:
                process.terminate()
                process.wait(30)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(claim: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_cell_of_a_killed_worker_runs_again_and_fails_only_when_that_does_not_help(
    jobs: Callable[..., list[Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5")
    started = jobs(DIES_ONCE, DIES, LOOKS_ABOUT, "ended = Ended(name, 'failed', 'out of luck')")
    before = signal.getsignal(signal.SIGTERM)
    told = {ended.name: ended for ended in RayCluster(retries=1)(started, run_whole_cell)}
    assert signal.getsignal(signal.SIGTERM) is before
    assert {name: ended.status for name, ended in told.items()} == {
        "a": "finished",
        "b": "failed",
        "c": "finished",
        "d": "failed",
    }
    assert (started[0].folder / "tries").read_text() == "xx"
    assert "WorkerCrashedError" in told["b"].reason
    assert told["d"].reason == "out of luck"
    assert (started[2].folder / OUTPUT).read_text().split() == ["printed", "complained"]
    seen = (started[2].folder / "seen").read_text()
    assert seen == repr((os.getcwd(), "http://localhost:5", ""))


@pytest.mark.slow
def test_signal_lets_running_cells_save_and_starts_no_more(jobs: Callable[..., list[Job]]) -> None:
    started = jobs(WAITS, WAITS)

    def interrupt() -> None:
        wait_for((started[0].folder / "started").exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    seen: list[Ended] = []
    whole = len(os.sched_getaffinity(0))
    with pytest.raises(KeyboardInterrupt):
        seen.extend(RayCluster(num_cpus=whole)(started, run_whole_cell))
    thread.join()
    assert seen == [Ended("a", "stopped", "by a signal")]
    assert (started[0].folder / "saved").exists()
    assert not (started[1].folder / "started").exists()


@pytest.mark.slow
def test_cluster_that_is_there_is_used_and_what_it_lacks_is_told_first(
    head: str, jobs: Callable[..., list[Job]], tmp_path: Path
) -> None:
    (job,) = jobs(LOOKS_ABOUT)
    assert list(RayCluster(address=head)([job], run_whole_cell)) == [Ended("a", "finished")]
    with pytest.raises(ValueError, match=f"does not see {tmp_path / 'nowhere'}"):
        list(RayCluster(address=head)([Job("b", tmp_path / "nowhere")], run_whole_cell))
    with pytest.raises(ValueError, match="no machine of the Ray cluster has 1 CPUs and 64 GPUs"):
        list(RayCluster(address=head, num_gpus=64)([job], run_whole_cell))


@pytest.mark.parametrize(
    "settings", [{"num_cpus": -1}, {"num_gpus": "all"}, {"retries": -1}, {"retries": 0.5}]
)
def test_resources_are_checked_at_construction(settings: dict) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"ray_cluster\.{name}"):
        RayCluster(**settings)


def test_missing_ray_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"objective-zoo\[cluster\]"):
        list(RayCluster()([Job("a", Path("a"))], run_whole_cell))
