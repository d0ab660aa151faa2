"""Records of other people, and damaged ones: read as far as they go, and nothing of ours leaves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import mlflow_sync
from benchmarks.records.jsonl import RECORD, read_lines, read_record, read_start
from benchmarks.records.mlflow_entries import send_entries
from benchmarks.records.mlflow_sync import SENT, send
from benchmarks.records.recorders import Jsonl

SERVER = "http://127.0.0.1:9"
START = {
    "kind": "start",
    "id": "0123",
    "name": "x",
    "time": 1,
    "parent": None,
    "store": {"uri": SERVER, "experiment": "e"},
}
POINT = {"kind": "metrics", "step": 1, "time": 2, "values": {"loss": 0.5}}


def foreign(folder: Path, *lines: dict[str, Any] | bytes) -> Path:
    folder.mkdir()
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / RECORD).write_bytes(b"".join(line + b"\n" for line in raw))
    return folder


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\x00\x80",
        b"null",
        b'"metrics"',
        b"[" * 100_000,
        b'{"kind": "tags", "values": ' + b'{"a":' * 5000,
        b'{"kind": ["metrics"]}',
        POINT | {"values": None},
        POINT | {"values": [1]},
        POINT | {"values": {"loss": None}},
        POINT | {"values": {"loss": "0.5"}},
        POINT | {"values": {"loss": True}},
        POINT | {"values": {"loss": 10**400}},
        POINT | {"step": "1"},
        POINT | {"step": 1.5},
        POINT | {"step": 2**70},
        POINT | {"time": None},
        {"kind": "metrics"},
        {"kind": "params", "values": {"a": 1}},
        {"kind": "tags", "values": {"a": {"b": "c"}}},
        {"kind": "tags", "values": {"a": "\ud800"}},
        {"kind": "artifact", "path": 3},
        {"kind": "artifact"},
        {"kind": "end", "status": "DONE", "time": 3},
        {"kind": "end", "status": {}, "time": 3},
        {"kind": "resume"},
        START | {"id": "' or 1=1"},
        START | {"parent": {"id": None}},
        START | {"store": "a"},
    ],
    ids=lambda line: str(line)[:40],
)
def test_line_of_another_form_is_skipped_counted_and_numbered(
    tmp_path: Path, line: dict[str, Any] | bytes
) -> None:
    record = read_record(foreign(tmp_path / "run", START, line, POINT))
    assert record.unreadable_lines == [2]
    assert record.unreadable == 1
    assert record.metrics["loss"].last == 0.5


def test_resume_names_the_lines_that_it_skips(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Jsonl().start("x", foreign(tmp_path / "run", START, b"\xff", POINT, b"{"))
    assert run.id == "0123"
    assert f"{tmp_path / 'run' / RECORD}: 2 lines cannot be read and are skipped: [2, 4]" in (
        caplog.text
    )


def test_lines_of_a_kind_that_is_not_known_are_passed_over(tmp_path: Path) -> None:
    record = read_record(foreign(tmp_path / "run", START, {"kind": "later", "what": [1]}))
    assert record.unreadable == 0


def test_non_finite_numbers_are_no_damage(tmp_path: Path) -> None:
    values = {"a": "NaN", "b": "-Infinity", "c": float("inf")}
    record = read_record(foreign(tmp_path / "run", START, POINT | {"values": values}))
    assert record.unreadable == 0
    assert record.metrics["b"].last == -record.metrics["c"].last == float("-inf")


@pytest.mark.parametrize(
    "path", ["{secret}", "../secret", "a/../../secret", "link", "folder/secret", "loop", "a\0b"]
)
def test_file_outside_the_folder_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    good = foreign(tmp_path / "a run", START, POINT)
    named = path.format(secret=secret)
    bad = foreign(tmp_path / "bad", START, POINT, {"kind": "artifact", "path": named})
    (bad / "link").symlink_to(secret)
    (bad / "folder").symlink_to(tmp_path)
    (bad / "loop").symlink_to(bad / "loop")

    def opened(self: object) -> None:
        raise AssertionError("the store was opened")

    monkeypatch.setattr(mlflow_sync.Store, "client", opened)
    with pytest.raises(ValueError, match="outside the folder of the run") as error:
        send(tmp_path)
    assert repr(named) in str(error.value)
    assert not list(good.glob(SENT))


class Client:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.metrics: list[str] = []

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=True) -> None:
        assert len(metrics) <= 1000
        self.metrics += [metric.key for metric in metrics]
        self.params |= {param.key: param.value for param in params}
        self.tags |= {tag.key: tag.value for tag in tags}

    def log_artifact(self, run_id, path, where=None) -> None:
        self.files[Path(path).name] = Path(path).read_text()

    def log_text(self, run_id, text, name) -> None:
        self.files[name] = text


def sent(folder: Path) -> Client:
    client = Client()
    lines = [entry for entry, _ in read_lines(folder / RECORD) if entry is not None]
    send_entries(client, "1", folder, lines)  # type: ignore[arg-type]
    return client


def test_secrets_of_an_old_record_are_not_sent(tmp_path: Path) -> None:
    address = "http://me:Zx9-hush_77@host"
    folder = foreign(
        tmp_path / "run",
        START,
        {"kind": "params", "values": {"mlflow.tracking_uri": address}},
        {"kind": "tags", "values": {"error": f"no answer from {address}"}},
        {"kind": "artifact", "path": "config.gin"},
        {"kind": "artifact", "path": "note.txt"},
    )
    (folder / "config.gin").write_text(f"mlflow.tracking_uri = '{address}'\n")
    (folder / "note.txt").write_text("plain")
    client = sent(folder)
    assert client.params == {"mlflow.tracking_uri": "http://me:***@host"}
    assert client.tags == {"error": "no answer from http://me:***@host"}
    assert client.files == {
        "config.gin": "mlflow.tracking_uri = 'http://me:***@host'\n",
        "note.txt": "plain",
    }
    assert "hush" not in f"{read_record(folder)} {read_record(folder).text('config.gin')}"


def test_names_beyond_the_rules_of_mlflow_lose_nothing(tmp_path: Path) -> None:
    long = "n" * 400
    values = {f"m{i}": 0.0 for i in range(2500)} | {"AR@100": 1.0, long: 2.0}
    client = sent(foreign(tmp_path / "run", START, POINT | {"values": values}))
    assert len(set(client.metrics)) == len(values)
    assert "AR_x40_100" in client.metrics
    assert list(client.tags.values()) == [long]  # the whole of the name that was cut


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"])
def test_credentials_go_only_to_a_server_that_the_user_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Reached(Exception):
        pass

    def opened(self: object) -> None:
        raise Reached("here")

    monkeypatch.setattr(mlflow_sync.Store, "client", opened)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = foreign(tmp_path / "run", START, POINT)
    monkeypatch.setenv(name, "Zx9-hush_77")
    with pytest.raises(ValueError, match=f"{name} of the environment") as error:
        send(folder)
    assert "hush" not in str(error.value)
    with pytest.raises(ConnectionError, match="Reached"):
        send(folder, SERVER)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    with pytest.raises(ConnectionError, match="Reached"):
        send(folder)


def test_store_without_its_password_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
    store = {"uri": "http://me:***@127.0.0.1:9", "experiment": "e"}
    with pytest.raises(ValueError, match="Set MLFLOW_TRACKING_PASSWORD"):
        send(foreign(tmp_path / "run", START | {"store": store}))


def test_run_whose_parent_is_not_here_is_sent_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = foreign(tmp_path / "other", START | {"id": "9"})
    start = START | {"parent": {"id": "7", "folder": "../other"}}
    folder = foreign(tmp_path / "run", start)
    read = read_start(folder)
    assert read is not None
    assert mlflow_sync._parent_of(folder, read) is None
    assert f"{other} holds no record of the parent" in caplog.text
    assert sorted(path.name for path in other.iterdir()) == [RECORD]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": ["b", "c"]}', "\0"])
def test_note_of_what_was_sent_that_cannot_be_read_counts_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder = foreign(tmp_path / "run", START)
    (folder / SENT).write_text(text)
    caplog.set_level(logging.WARNING)
    assert mlflow_sync._read_sent(folder) == {}
    assert f"{SENT} cannot be read" in caplog.text
