"""The record in a run's folder: what is written comes back, and a killed writer loses one line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import full_disk
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.records.jsonl import RECORD, RecordWriter, numbers, read_lines, read_record
from benchmarks.records.recorders import Jsonl

START = {"id": "7", "name": "a", "time": 1, "parent": None, "store": None}
values = st.dictionaries(st.text(min_size=1), st.floats(), max_size=4)


def write(folder: Path, rows: list[dict[str, float]]) -> None:
    writer = RecordWriter(folder)
    writer.append("start", **START)
    for step, row in enumerate(rows):
        writer.append("metrics", step=step, time=step, values=numbers(row))
    writer.close()


@given(rows=st.lists(values, max_size=6))
def test_metrics_come_back_bit_equal(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write(folder, rows)
    record = read_record(folder)
    back: list[dict[str, float]] = [{} for _ in rows]
    for name, history in record.metrics.items():
        for step, value in zip(history.steps, history.values, strict=True):
            back[step][name] = value
    for row, got in zip(rows, back, strict=True):
        assert row.keys() == got.keys()
        assert np.array_equal(list(row.values()), [got[name] for name in row], equal_nan=True)


def test_lines_are_strict_json(tmp_path: Path) -> None:
    write(tmp_path, [{"nan": math.nan, "up": math.inf, "down": -math.inf}])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / RECORD).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@given(cut=st.integers(0, 10_000))
def test_record_cut_anywhere_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    write(folder, [{"loss": 0.1 * i, "ü": i} for i in range(5)])
    path = folder / RECORD
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    kept = whole[: first + cut % (len(whole) - first)]
    path.write_bytes(kept)
    steps = kept.count(b"\n") - 1
    torn = read_record(folder)
    assert len(torn.metrics["loss"].steps if steps else []) == steps
    assert torn.unreadable == (not kept.endswith(b"\n"))

    writer = RecordWriter(folder)  # the run is resumed
    writer.append("metrics", step=9, time=9, values={"loss": 7.0})
    writer.close()
    record = read_record(folder)
    assert record.metrics["loss"].last == 7.0
    only_the_newline_was_lost = whole[len(kept) : len(kept) + 1] == b"\n"
    assert len(record.metrics["loss"].steps) == steps + only_the_newline_was_lost + 1
    assert path.read_bytes().startswith(kept), "only appended to"


def test_step_recorded_twice_counts_once_with_the_later_value(tmp_path: Path) -> None:
    write(tmp_path, [{"loss": 1.0}, {"loss": 2.0}])
    writer = RecordWriter(tmp_path)
    writer.append("resume", time=5)
    writer.append("metrics", step=1, time=6, values={"loss": 3.0})
    writer.close()
    history = read_record(tmp_path).metrics["loss"]
    assert history.steps.tolist() == [0, 1]
    assert history.values.tolist() == [1.0, 3.0]


def test_lines_are_read_from_an_offset_on(tmp_path: Path) -> None:
    write(tmp_path, [{"loss": 1.0}, {"loss": 2.0}])
    lines = list(read_lines(tmp_path / RECORD))
    rest = list(read_lines(tmp_path / RECORD, lines[1][1]))
    assert rest == lines[2:]


def test_sigkill_loses_at_most_the_line_being_written(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from benchmarks.records.recorders import Jsonl
run = Jsonl().start("a", Path({str(tmp_path)!r}))
step = 0
while True:
    run.metrics({{"loss": step}}, step)
    print(step, flush=True)
    step += 1
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 200:
            os.kill(process.pid, signal.SIGKILL)
            break
    told = int((process.stdout.read().split() or ["200"])[-1])
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    record = read_record(tmp_path)
    steps = record.metrics["loss"].steps
    assert steps.tolist() == list(range(len(steps)))
    assert len(steps) >= told + 1
    assert record.status == "RUNNING"


def test_folder_without_a_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record\.jsonl is missing"):
        read_record(tmp_path)


# --- a full disk


def test_lines_wait_while_the_disk_is_full_and_none_is_lost_or_torn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = RecordWriter(tmp_path)
    writer.append("start", **START)
    full = (tmp_path / RECORD).stat().st_size + 30  # in the middle of a line
    with full_disk(full):
        for step in range(5):
            writer.append("metrics", step=step, time=step, values={"loss": float(step)})
    assert (tmp_path / RECORD).stat().st_size == full
    writer.append("metrics", step=5, time=5, values={"loss": 5.0})
    assert writer.close() == 0
    record = read_record(tmp_path)
    assert record.metrics["loss"].values.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert record.unreadable == 0
    first, second = (r.getMessage() for r in caplog.records)  # once each
    assert first.startswith(f"the record {tmp_path / RECORD} cannot be written: ")
    assert "is whole again: 6 lines waited" in second


def test_lines_that_never_found_room_are_counted_and_the_run_is_not_called_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Jsonl().start("a", tmp_path)
    with full_disk((tmp_path / RECORD).stat().st_size):
        run.metrics({"loss": 1.0}, 1)
        with pytest.raises(OSError, match=r"2 lines of the record .* could not be written"):
            run.close()
    assert "2 lines of the record" in caplog.text
    assert read_record(tmp_path).status == "RUNNING"


def test_error_of_a_run_is_not_hidden_by_a_record_that_has_no_room(tmp_path: Path) -> None:
    run = Jsonl().start("a", tmp_path)
    with (
        full_disk((tmp_path / RECORD).stat().st_size),
        pytest.raises(RuntimeError, match="it broke"),
        run,
    ):
        raise RuntimeError("it broke")
