"""Runs and recorders: what a record holds, how a run ends and how it goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

from benchmarks.records.jsonl import RECORD, RecordWriter, read_record
from benchmarks.records.mlflow_store import Store
from benchmarks.records.recorders import Jsonl, Mlflow, Null
from registry import recorders


def test_recorders_are_enrolled() -> None:
    assert {"null", "jsonl", "mlflow"} <= set(recorders.names())


def test_null_leaves_nothing_on_disk(tmp_path: Path) -> None:
    with Null().start("a", tmp_path / "run") as run, run.child("b", tmp_path / "b") as child:
        child.params({"x": 1})
        child.metrics({"loss": 1.0}, 0)
        child.text("hello", "notes.txt")
    assert list(tmp_path.iterdir()) == []


def test_record_holds_what_was_recorded(tmp_path: Path) -> None:
    with Jsonl().start("a", tmp_path / "a", tags={"kind": "comparison"}) as run:
        run.params({"run.seed": 3})
        run.metrics({"loss": 0.5, "rate": 2}, 10)
        run.text("x = 1", "config/operative.gin")
        (tmp_path / "a/here.png").write_bytes(b"png")
        run.artifact(tmp_path / "a/here.png")
    record = read_record(tmp_path / "a")
    assert (record.id, record.name, record.status) == (run.id, "a", "FINISHED")
    assert record.params == {"run.seed": "3"}
    assert record.tags == {"kind": "comparison"}
    assert record.metrics["loss"].steps.tolist() == [10]
    assert record.metrics["rate"].last == 2.0
    assert record.text("config/operative.gin") == "x = 1"
    assert record.artifacts == [tmp_path / "a/config/operative.gin", tmp_path / "a/here.png"]


def test_child_names_its_parent(tmp_path: Path) -> None:
    with Jsonl().start("a", tmp_path) as run, run.child("b", tmp_path / "b") as child:
        pass
    assert read_record(tmp_path / "b").parent == run.id != child.id
    with pytest.raises(ValueError, match="holds no record"):
        Jsonl().start("c", tmp_path / "c", parent=tmp_path / "nowhere")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_with_block_records_how_the_run_ended(
    tmp_path: Path, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), Jsonl().start("a", tmp_path):
        raise error
    record = read_record(tmp_path)
    assert record.status == status
    assert record.tags["error"].startswith(type(error).__name__)


def test_started_again_the_record_goes_on_under_its_id(tmp_path: Path) -> None:
    with Jsonl().start("a", tmp_path) as first:
        first.metrics({"loss": 1.0}, 0)
    second = Jsonl().start("a", tmp_path)
    second.metrics({"loss": 2.0}, 1)
    assert second.id == first.id
    record = read_record(tmp_path)
    assert record.status == "RUNNING"
    assert record.ended is None
    assert record.metrics["loss"].values.tolist() == [1.0, 2.0]
    second.close("KILLED")
    assert read_record(tmp_path).status == "KILLED"


def test_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    Jsonl().start("a", tmp_path).close()
    with pytest.raises(ValueError, match="run 'a', not of 'b'"):
        Jsonl().start("b", tmp_path)


def test_changed_param_keeps_its_first_value_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Jsonl().start("a", tmp_path).params({"steps": 10, "seed": 0})
    again = Jsonl().start("a", tmp_path)
    again.params({"steps": 20, "seed": 0})
    again.params({"steps": 20})
    record = read_record(tmp_path)
    assert record.params == {"steps": "10", "seed": "0"}
    assert record.tags == {"changed.steps": "20"}
    assert [r.message for r in caplog.records] == ["run a: steps was 10, now 20"]
    again.params({"steps": 10})
    assert read_record(tmp_path).tags == {"changed.steps": "10"}


def test_first_non_finite_value_becomes_a_tag(tmp_path: Path) -> None:
    run = Jsonl().start("a", tmp_path)
    for step, loss in enumerate([1.0, math.inf, math.nan]):
        run.metrics({"loss": loss}, step)
    record = read_record(tmp_path)
    assert record.tags == {"non_finite.loss": "inf at step 1"}
    assert math.isnan(record.metrics["loss"].last)


def test_long_params_are_kept_whole(tmp_path: Path) -> None:
    run = Jsonl().start("a", tmp_path)
    run.params({"repr": "é" * 7000})
    assert read_record(tmp_path).params["repr"] == "é" * 7000
    assert json.loads((tmp_path / "params.json").read_text())["repr"] == "é" * 7000


@pytest.mark.parametrize("name", ["AR@100", "", "/a", "../a", "a//b", "x" * 251, "a\n", "größe %"])
def test_any_name_is_recorded_as_it_is(tmp_path: Path, name: str) -> None:
    run = Jsonl().start("a", tmp_path)
    run.metrics({name: 1.0}, 0)
    run.params({name: 1})
    record = read_record(tmp_path)
    assert record.metrics[name].last == 1.0
    assert record.params[name] == "1"


@pytest.mark.parametrize("value", [None, "high", [1.0, 2.0], 10**400])
def test_value_that_is_no_number_is_refused_by_its_name(tmp_path: Path, value: object) -> None:
    run = Jsonl().start("a", tmp_path)
    lines = (tmp_path / RECORD).read_bytes()
    with pytest.raises(ValueError, match="'accuracy' has the value"):
        run.metrics({"accuracy": value}, 0)
    assert (tmp_path / RECORD).read_bytes() == lines


def test_text_stays_inside_the_folder(tmp_path: Path) -> None:
    run = Jsonl().start("a", tmp_path / "run")
    for name in ("../out.txt", "/tmp/out.txt", "record.jsonl"):
        with pytest.raises(ValueError, match="inside"):
            run.text("x", name)
    with pytest.raises(ValueError, match="is not a file"):
        run.artifact(tmp_path / "missing.png")
    (tmp_path / "outside.png").write_bytes(b"png")
    (tmp_path / "run" / "link.png").symlink_to(tmp_path / "outside.png")
    for outside in (tmp_path / "outside.png", tmp_path / "run" / "link.png"):
        with pytest.raises(ValueError, match="lies outside the run's folder"):
            run.artifact(outside)


def test_status_must_be_known(tmp_path: Path) -> None:
    run = Jsonl().start("a", tmp_path)
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        run.close("DONE")


@pytest.mark.parametrize(
    "uri", ["file:///tmp/mlruns", "runs", "sqlite://", "sqlite:///a.db?timeout=5"]
)
def test_unusable_store_is_refused_at_construction(uri: str) -> None:
    with pytest.raises(ValueError, match="tracking_uri"):
        Mlflow(tracking_uri=uri)


def test_store_defaults_to_the_environment_and_then_lies_beside_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Mlflow().store_for(Path("runs/x")).uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert Mlflow().store_for(Path("/data/exp/x")).uri == "sqlite:////data/exp/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert Mlflow().store_for(Path("runs/x")).uri == "http://localhost:5000"


def test_continued_run_keeps_the_local_store_that_its_record_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old = tmp_path / "old" / "mlflow.db"
    store = {"uri": f"sqlite:///{old}", "experiment": "objective-zoo"}
    writer = RecordWriter(tmp_path / "run")
    writer.append("start", id="7", name="a", time=1, parent=None, store=store)
    writer.close()
    beside = tmp_path / "mlflow.db"
    assert Mlflow().store_for(tmp_path / "run").file == beside  # the old one is gone
    old.parent.mkdir()
    old.touch()
    assert Mlflow().store_for(tmp_path / "run").file == old


@pytest.mark.parametrize("folder", ["50% off", "a%20b", "what?", "exp #1", "plain"])
def test_store_opens_the_file_that_lies_in_the_folder(tmp_path: Path, folder: str) -> None:
    file = tmp_path / folder / "mlflow.db"
    store = Store.in_file(file, "e")
    assert store.file == Store.of(store.uri, "e").file == file
    assert make_url(store.address).database == str(file)


def test_importing_the_recorders_does_not_import_mlflow() -> None:
    code = "import benchmarks.records.recorders, sys; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
