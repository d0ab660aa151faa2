"""The record of a run: `record.jsonl` in its folder, one JSON object in each line.

Lines are only ever added at the end:

    {"kind": "start", "id": ..., "name": ..., "time": ms, "parent": ..., "store": ...}
    {"kind": "params" | "tags", "values": {name: text}}
    {"kind": "metrics", "step": n, "time": ms, "values": {name: number}}
    {"kind": "artifact", "path": ...}       relative to the folder if the file lies inside
    {"kind": "end", "status": ..., "time": ms}
    {"kind": "resume", "time": ms}          the run goes on after an end

Every line is handed to the operating system before the call returns, so a killed process loses at
most the line that it was writing, and every checkpoint waits until the disk has the lines before
it. A reader skips such a torn line, and any other line that has not this form, and counts them.
Numbers that are not finite are written as the texts "NaN", "Infinity" and "-Infinity", so that
every line is strict JSON. Times are in milliseconds since 1970.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from registry.secrets import concealed

RECORD = "record.jsonl"
KINDS = ("start", "params", "tags", "metrics", "artifact", "end", "resume")
STATUSES = ("FINISHED", "FAILED", "KILLED")
NON_FINITE = ("NaN", "Infinity", "-Infinity")
_LARGEST = 2**62  # of steps and times, which NumPy and MLflow keep in 64 bits
_ID = re.compile(r"[\w-]+")  # it stands in queries to MLflow
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a text that no file can hold

log = logging.getLogger(__name__)


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class RecordWriter:
    """Appends lines to the record of a folder. If the last line is torn, it is ended first.

    While the disk is full, lines wait in memory, and the run goes on. A warning says so once, and
    once more when they are written. `append` never raises for that; `close` returns how many lines
    are lost because there was no room until the end.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RECORD
        torn = (
            self._path.exists() and self._path.stat().st_size and not _ends_with_newline(self._path)
        )
        self._file = open(self._path, "ab", buffering=0)
        self._waiting = bytearray(b"\n" if torn else b"")  # what the file does not have yet
        self._failed = False

    def append(self, kind: str, **entry: Any) -> None:
        line = json.dumps({"kind": kind, **entry}, allow_nan=False)
        self._waiting += line.encode() + b"\n"
        self._write()

    def close(self) -> int:
        self._write()
        if lost := self._waiting.count(b"\n"):
            log.error("%d lines of the record %s could not be written", lost, self._path)
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as problem:  # as some network file systems tell it
            log.error("the record %s may not be whole: %s", self._path, problem.strerror)
        return lost

    def _write(self) -> None:
        """Write what waits, from the byte on at which the disk was full, so that no line tears."""
        waited = self._waiting.count(b"\n")
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as problem:
            if not self._failed:
                log.warning(
                    "the record %s cannot be written: %s. The run goes on, and its lines wait in "
                    "memory until there is room",
                    self._path,
                    problem.strerror,
                )
            self._failed = True
        else:
            if self._failed:
                log.warning("the record %s is whole again: %d lines waited", self._path, waited)
            self._failed = False


def numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """The values as strict JSON has them: those that are not finite become texts."""
    return {name: v if math.isfinite(v) else _non_finite(v) for name, v in values.items()}


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """The complete lines from a byte offset on, each with the offset of the next line.

    A line that cannot be read gives None. A last line without a newline is not given.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            yield _parse(raw), offset


def read_start(folder: Path) -> dict[str, Any] | None:
    """The start line of the folder's record; None if there is none that can be read."""
    path = folder / RECORD
    if not path.is_file():
        return None
    starts = (e for e, _ in read_lines(path) if e is not None and e["kind"] == "start")
    return next(starts, None)


@dataclass(frozen=True)
class History:
    """The values of one metric by step, in ascending order.

    A run that is resumed may record a step twice. Then the later value counts.
    """

    steps: np.ndarray  # int64 [n]
    values: np.ndarray  # float64 [n]
    times: np.ndarray  # int64 [n], milliseconds since 1970

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass
class Record:
    """What was recorded of one run."""

    folder: Path
    id: str
    name: str
    started: int
    parent: str | None = None  # the id of the parent run
    status: str = "RUNNING"
    ended: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, History] = field(default_factory=dict)
    artifacts: list[Path] = field(default_factory=list)
    unreadable_lines: list[int] = field(default_factory=list)  # their numbers, from 1 on

    @property
    def unreadable(self) -> int:
        """The number of lines that were skipped: torn ones, and those of another form."""
        return len(self.unreadable_lines)

    def text(self, name: str) -> str:
        """The last content that `text(content, name)` of the run recorded."""
        return concealed((self.folder / name).read_text(encoding="utf-8"))


def read_record(folder: Path | str) -> Record:
    """The record in a run's folder; the run may have ended, still go on, or have been killed."""
    folder = Path(folder)
    start = read_start(folder)
    if start is None:
        raise ValueError(f"{folder / RECORD} is missing or has no start line; give a run's folder")
    parent = start["parent"]["id"] if start["parent"] else None
    record = Record(folder, start["id"], start["name"], start["time"], parent)
    points: dict[str, dict[int, tuple[float, int]]] = {}
    number, read = 0, 0
    for number, (entry, read) in enumerate(read_lines(folder / RECORD), 1):  # noqa: B007
        if entry is None:
            record.unreadable_lines.append(number)
        elif entry["kind"] == "metrics":
            for name, value in entry["values"].items():
                points.setdefault(name, {})[entry["step"]] = (float(value), entry["time"])
        else:
            _apply(record, entry)
    if read < (folder / RECORD).stat().st_size:
        record.unreadable_lines.append(number + 1)
    record.metrics = {name: _history(by_step) for name, by_step in points.items()}
    return record


def _apply(record: Record, entry: dict[str, Any]) -> None:
    match entry["kind"]:
        case "params":
            record.params.update(_concealed(entry["values"]))
        case "tags":
            record.tags.update(_concealed(entry["values"]))
        case "artifact":
            path = record.folder / entry["path"]
            if path not in record.artifacts:
                record.artifacts.append(path)
        case "end":
            record.status, record.ended = entry["status"], entry["time"]
        case "resume":
            record.status, record.ended = "RUNNING", None


def _concealed(values: Mapping[str, str]) -> dict[str, str]:
    """Without secrets, which earlier versions recorded."""
    return {name: concealed(value) for name, value in values.items()}


def _history(by_step: dict[int, tuple[float, int]]) -> History:
    steps = sorted(by_step)
    return History(
        steps=np.array(steps, dtype=np.int64),
        values=np.array([by_step[s][0] for s in steps], dtype=np.float64),
        times=np.array([by_step[s][1] for s in steps], dtype=np.int64),
    )


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and _has_form(entry) else None


def _has_form(entry: dict[str, Any]) -> bool:
    """Whether a line has what its kind needs; of a kind that is not known, nothing is asked."""
    match entry:
        case {"kind": "start", "id": id, "name": name, "time": time, "parent": up, "store": store}:
            return (
                _is_text(id)
                and bool(_ID.fullmatch(id))
                and _is_text(name)
                and _is_whole(time)
                and (up is None or _holds_texts(up, "id", "folder"))
                and (store is None or _holds_texts(store, "uri", "experiment"))
            )
        case {"kind": "params" | "tags", "values": dict(values)}:
            return all(map(_is_text, (*values, *values.values())))
        case {"kind": "metrics", "step": step, "time": time, "values": dict(values)}:
            whole = _is_whole(step) and _is_whole(time)
            return whole and all(map(_is_text, values)) and all(map(_is_number, values.values()))
        case {"kind": "artifact", "path": path}:
            return _is_text(path)
        case {"kind": "end", "status": status, "time": time}:
            return status in STATUSES and _is_whole(time)
        case {"kind": "resume", "time": time}:
            return _is_whole(time)
        case {"kind": str(kind)}:
            return kind not in KINDS
    return False


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _HALF_CHARACTER.search(value)


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < _LARGEST


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return value in NON_FINITE
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _holds_texts(value: object, *names: str) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(name)) for name in names)


def _non_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
