"""The copy in MLflow: whole, sent once, and whole again after every kind of outage."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import mlflow_store
from benchmarks.records.jsonl import RECORD, read_record
from benchmarks.records.mlflow_store import Store, _import_mlflow
from benchmarks.records.mlflow_sync import ID_TAG, SENT, Copy, Follower, send
from benchmarks.records.open_run import OpenRun
from benchmarks.records.recorders import Jsonl, Mlflow


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    """One sqlite store for all tests of this file."""
    file = shutil.copy(empty_store, tmp_path_factory.mktemp("a store") / "mlflow.db")
    return f"sqlite:///{file}"


def client_of(uri: str) -> Any:
    return Store.of(uri, "").client()


def mlflow_run(uri: str, folder: Path) -> Any:
    """The one MLflow run of a record."""
    client = client_of(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    filter_string = f"tags.`{ID_TAG}` = '{read_record(folder).id}'"
    (run,) = client.search_runs(experiments, filter_string)
    return run


def assert_copied(uri: str, folder: Path) -> None:
    """Every point of the record is in the store, once, and nothing else is."""
    record, run, client = read_record(folder), mlflow_run(uri, folder), client_of(uri)
    assert run.data.metrics.keys() == record.metrics.keys()
    for name, history in record.metrics.items():
        points = client.get_metric_history(run.info.run_id, name)
        points = sorted((p.step, p.timestamp, p.value) for p in points)
        assert points == list(
            zip(history.steps, history.times, history.values.tolist(), strict=True)
        )
    assert run.data.params == record.params
    assert run.data.tags.items() >= record.tags.items()
    assert (run.info.status, run.info.end_time) == (record.status, record.ended)


def log_steps(run: OpenRun, first: int, last: int) -> None:
    for step in range(first, last):
        run.metrics({"loss": 1 / (step + 1), "rate": step}, step)


def fast(uri: str) -> Mlflow:
    return Mlflow(tracking_uri=uri, send_seconds=0.1)


def test_run_is_copied_whole(uri: str, tmp_path: Path) -> None:
    with fast(uri).start("a", tmp_path, tags={"kind": "comparison"}) as run:
        run.params({f"p{i}": i for i in range(130)})  # MLflow takes 100 at once
        log_steps(run, 0, 700)  # and 1000 metric points
        run.text("x = 1", "config/operative.gin")
        with run.child("b", tmp_path / "b") as child:
            log_steps(child, 0, 3)
    assert_copied(uri, tmp_path)
    assert_copied(uri, tmp_path / "b")
    parent, nested = mlflow_run(uri, tmp_path).info, mlflow_run(uri, tmp_path / "b")
    assert nested.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (parent.run_name, nested.info.run_name) == ("a", "b")
    files = client_of(uri).list_artifacts(parent.run_id, "config")
    assert [f.path for f in files] == ["config/operative.gin"]
    database = Store.of(uri, "").file
    assert database is not None
    assert len(list((database.parent / "mlartifacts").rglob(f"{parent.run_id}/**/*.gin"))) == 1


def test_non_finite_values_and_long_params_are_told(uri: str, tmp_path: Path) -> None:
    with fast(uri).start("a", tmp_path) as run:
        run.metrics({"nan": math.nan, "up": math.inf}, 4)
        run.params({"repr": "x" * 7000, "empty": ""})
    copied = mlflow_run(uri, tmp_path)
    assert math.isnan(copied.data.metrics["nan"])
    assert copied.data.metrics["up"] == sys.float_info.max  # MLflow's way to store it
    assert copied.data.tags["non_finite.up"] == "inf at step 4"
    assert copied.data.params["repr"].endswith(
        "[cut; all 7000 characters are in the artifact params.json]"
    )
    assert len(copied.data.params["repr"]) == 6000
    assert copied.data.params["empty"] == ""
    assert "params.json" in [f.path for f in client_of(uri).list_artifacts(copied.info.run_id)]


def test_resumed_run_goes_on_in_the_same_mlflow_run(uri: str, tmp_path: Path) -> None:
    with fast(uri).start("a", tmp_path) as run:
        run.params({"seed": 1})
        log_steps(run, 0, 5)
    before = mlflow_run(uri, tmp_path).info.run_id
    run = fast(uri).start("a", tmp_path)
    run.params({"seed": 2})
    log_steps(run, 5, 9)
    run.close("KILLED")
    assert mlflow_run(uri, tmp_path).info.run_id == before
    assert_copied(uri, tmp_path)


@pytest.mark.parametrize("noted", ["nothing", "the run alone", "a run that is gone"])
def test_sending_again_changes_nothing(uri: str, tmp_path: Path, noted: str) -> None:
    with Jsonl().start("a", tmp_path) as run:
        run.params({"seed": 1})
        log_steps(run, 0, 600)
        run.metrics({"loss": math.nan}, 600)
    send(tmp_path, uri)
    ((name, (run_id, _)),) = json.loads((tmp_path / SENT).read_text()).items()
    # As if the process had been killed after sending, before noting it.
    state = {
        "nothing": {},
        "the run alone": {name: (run_id, 0)},
        "a run that is gone": {name: ("0" * 32, 10**6)},
    }[noted]
    (tmp_path / SENT).write_text(json.dumps(state))
    assert send(tmp_path, uri) == [(tmp_path, run_id)]
    points = client_of(uri).get_metric_history(run_id, "loss")
    assert sorted(p.step for p in points) == list(range(601))
    assert mlflow_run(uri, tmp_path).data.params == {"seed": "1"}


def test_torn_line_is_left_out_and_told(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_steps(Jsonl().start("a", tmp_path), 0, 3)
    with open(tmp_path / RECORD, "ab") as file:
        file.write(b'{"kind": "metrics", "st')
    with Jsonl().start("a", tmp_path) as run:
        log_steps(run, 3, 5)
    send(tmp_path, uri)
    assert_copied(uri, tmp_path)
    assert len([r for r in caplog.records if "cannot be read, not sent" in r.message]) == 1


def test_lost_artifact_is_told_and_stops_nothing(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Jsonl().start("a", tmp_path) as run:
        run.text("x", "notes.txt")
        (tmp_path / "notes.txt").unlink()
        log_steps(run, 0, 3)
    send(tmp_path, uri)
    assert_copied(uri, tmp_path)
    assert "notes.txt is gone" in caplog.text


def test_absent_server_costs_one_warning_and_the_record_is_sent_later(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    run = fast(away).start("a", tmp_path / "run")
    child = run.child("b", tmp_path / "run" / "b")
    log_steps(child, 0, 20)
    wait_until(lambda: len(caplog.records) >= 2)  # one for each run
    time.sleep(1)  # time for more attempts, which stay quiet
    assert (
        len([r for r in caplog.records if "cannot send" in r.message]) == len(caplog.records) == 2
    )
    log_steps(child, 20, 30)
    start = time.monotonic()
    child.close()
    run.close()
    assert time.monotonic() - start < 10  # two refused connections
    told = [r.message for r in caplog.records if "Send it later" in r.message]
    assert shlex.join(["objective-zoo", "send", str(tmp_path / "run" / "b")]) in told[0]
    with pytest.raises(ConnectionError, match="Nothing is lost"):
        send(tmp_path)
    sent = send(tmp_path, uri)
    assert [folder for folder, _ in sent] == [tmp_path / "run", tmp_path / "run" / "b"]
    assert_copied(uri, tmp_path / "run")
    assert_copied(uri, tmp_path / "run" / "b")


def test_locked_database_delays_and_loses_nothing(uri: str, tmp_path: Path) -> None:
    with fast(uri).start("a", tmp_path) as run:
        log_steps(run, 0, 3)
        wait_until(lambda: (tmp_path / SENT).exists())
        path = uri.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("begin exclusive")
            log_steps(run, 3, 9)
            time.sleep(1)
            other.execute("rollback")
    assert_copied(uri, tmp_path)


def test_unusable_database_is_told_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").mkdir()
    start = time.monotonic()
    with fast(f"sqlite:///{tmp_path}/mlflow.db").start("a", tmp_path / "run") as run:
        log_steps(run, 0, 3)
    assert time.monotonic() - start < 10  # MLflow alone tries for more than a minute
    assert "unable to open database file" in caplog.text
    assert read_record(tmp_path / "run").status == "FINISHED"


class FlakyCopy(Copy):
    """Fails until `works`; counts its attempts."""

    works = False
    attempts = 0

    def send_some(self) -> bool:
        self.attempts += 1
        if not self.works:
            raise ConnectionError("refused")
        return False


def test_follower_waits_longer_each_time_and_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    copy = FlakyCopy(tmp_path, Store.of("http://localhost:1", "x"))
    follower = Follower(copy, seconds=0.05)
    time.sleep(1)  # waits of 0.1, 0.2, 0.4 and 0.8 s, where an even beat would try 20 times
    assert 2 <= copy.attempts <= 6
    copy.works = True
    assert follower.close(5) is None
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]


def test_lines_written_while_sending_are_sent_before_the_end(tmp_path: Path) -> None:
    class SlowCopy(FlakyCopy):
        works = True

        def send_some(self) -> bool:
            super().send_some()
            time.sleep(0.3)
            return False

    copy = SlowCopy(tmp_path, Store.of("http://localhost:1", "x"))
    follower = Follower(copy, seconds=60)
    wait_until(lambda: copy.attempts == 1)  # it has looked at the record; close() comes meanwhile
    assert follower.close(5) is None
    assert copy.attempts == 2


def test_follower_gives_up_on_a_store_that_stands_still(tmp_path: Path) -> None:
    class StuckCopy(Copy):
        def send_some(self) -> bool:
            time.sleep(3)
            return False

    follower = Follower(StuckCopy(tmp_path, Store.of("http://localhost:1", "x")), 0.05)
    start = time.monotonic()
    assert follower.close(0.3) == "no answer for 0.3 s"
    assert time.monotonic() - start < 2  # well before the copy comes back


def test_password_of_a_store_is_not_written(tmp_path: Path) -> None:
    store = Store.of("postgresql://me:secret@host/db", "x")
    assert store.name == "postgresql://me:***@host/db"
    assert "secret" not in repr(store)
    assert store.address.endswith(":secret@host/db")


def at_once(record: Callable[[Path], None], folders: Sequence[Path]) -> list[BaseProcess]:
    """`record` in a process each. Forked: importing mlflow takes each of them seconds."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=record, args=(folder,)) for folder in folders]
    for process in processes:
        process.start()
    return processes


def test_processes_make_one_store_and_fill_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    _import_mlflow()

    def record(folder: Path) -> None:
        with fast(uri).start("a", folder) as run:
            run.params({"folder": folder.name})
            log_steps(run, 0, 1500)

    folders = [tmp_path / name for name in "abc"]
    for process in at_once(record, folders):
        process.join(240)
        assert process.exitcode == 0
    for folder in folders:
        assert_copied(uri, folder)
    assert len(client_of(uri).search_experiments(filter_string="name = 'objective-zoo'")) == 1


@pytest.mark.slow  # two servers start
def test_server_that_dies_and_returns_loses_nothing_of_processes_that_record_at_once(
    tmp_path: Path,
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    _import_mlflow()
    died, returned = tmp_path / "died", tmp_path / "returned"

    def record(folder: Path) -> None:
        logging.basicConfig(filename=folder.with_suffix(".log"), force=True)
        run = fast(uri).start("a", folder)
        run.params({"folder": folder.name})
        log_steps(run, 0, 50)
        wait_until(died.exists, 240)
        log_steps(run, 50, 100)
        wait_until(returned.exists, 240)
        log_steps(run, 100, 150)
        run.text("x = 1", "config/operative.gin")
        run.close()

    folders = [tmp_path / name for name in "abc"]
    with server(tmp_path, uri):
        processes = at_once(record, folders)
        wait_until(lambda: all((folder / SENT).exists() for folder in folders), 120)
    died.touch()
    logs = [folder.with_suffix(".log") for folder in folders]
    wait_until(lambda: all("cannot send" in log.read_text() for log in logs), 120)
    with server(tmp_path, uri):
        returned.touch()
        for process in processes:
            process.join(240)
            assert process.exitcode == 0
        for folder in folders:
            assert_copied(uri, folder)
            query = f"path=config%2Foperative.gin&run_uuid={mlflow_run(uri, folder).info.run_id}"
            with urllib.request.urlopen(f"{uri}/get-artifact?{query}") as answer:
                assert answer.read() == b"x = 1"
    assert [log.read_text().count("cannot send") for log in logs] == [1, 1, 1]


@pytest.mark.slow
def test_hint_opens_the_page_of_a_local_store(uri: str, tmp_path: Path) -> None:
    with fast(uri).start("a", tmp_path) as run:
        run.text("x = 1", "config/operative.gin")
    run_id = mlflow_run(uri, tmp_path).info.run_id
    port = free_port()
    command = [*shlex.split(Store.of(uri, "").open_hint()), "--port", str(port), "--workers", "1"]
    with serving(command, f"http://127.0.0.1:{port}", tmp_path):
        query = f"path=config%2Foperative.gin&run_uuid={run_id}"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/get-artifact?{query}") as answer:
            assert answer.read() == b"x = 1"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until(claim: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@contextmanager
def server(folder: Path, uri: str) -> Iterator[None]:
    program = Path(sys.executable).with_name("mlflow")
    port = uri.rsplit(":", 1)[1]
    store = ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    artifacts = ["--artifacts-destination", f"{folder}/artifacts"]
    command = [str(program), "server", "--port", port, "--workers", "1", *store, *artifacts]
    with serving(command, uri, folder):
        yield


@contextmanager
def serving(command: list[str], uri: str, folder: Path) -> Iterator[None]:
    """A server in a process group of its own, killed with all its helpers."""
    with open(folder / "server.log", "ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        wait_until(lambda: process.poll() is not None or answers(uri), 240)
        assert process.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def test_store_that_was_killed_half_made_is_made_afresh(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.0123abcd.partial").write_bytes(b"half of a database")
    client = Store.of(f"sqlite:///{tmp_path / 'mlflow.db'}", "mine").client()
    assert [e.name for e in client.search_experiments()] == ["Default"]


def test_store_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mlflow:
        @staticmethod
        def MlflowClient(uri: str) -> None:
            Path(uri.removeprefix("sqlite:///")).write_bytes(b"half of a database")
            raise OSError("no space left")

    monkeypatch.setattr(mlflow_store, "_import_mlflow", lambda: Mlflow)
    with pytest.raises(OSError, match="no space left"):
        Store.of(f"sqlite:///{tmp_path / 'mlflow.db'}", "mine").client()
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]
