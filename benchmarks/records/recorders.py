"""Recorders: where the record of a run goes.

    null    nowhere
    jsonl   record.jsonl in the run's folder
    mlflow  the same, and a background thread copies it to an MLflow store

A recorder is configuration; `start` opens a run. The file comes first and is the truth, MLflow a
copy of it: when the store is away, training goes on and the copy is made later, at the latest by
`objective-zoo send FOLDER`. A folder that holds a record already continues it, under the same id
and in the same MLflow run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import re
import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from benchmarks.records.jsonl import RECORD, RecordWriter, now_ms, numbers, read_record, read_start
from benchmarks.records.mlflow_store import Store
from benchmarks.records.mlflow_sync import MAX_PARAM_LENGTH, MAX_TAG_LENGTH, Copy, Follower
from registry import recorders

STATUSES = ("FINISHED", "FAILED", "KILLED")

_log = logging.getLogger(__name__)


@recorders.register("null")
@dataclass(frozen=True, kw_only=True)
class Null:
    """Records nothing."""

    keeps_records: ClassVar = False

    def start(
        self,
        name: str,
        folder: Path,
        parent: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> NullRun:
        return NullRun(name)


@recorders.register("jsonl")
@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """Records to record.jsonl in the run's folder."""

    def start(
        self,
        name: str,
        folder: Path,
        parent: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Run:
        return Run(name, Path(folder), parent, tags or {})


@recorders.register("mlflow")
@dataclass(frozen=True, kw_only=True)
class Mlflow:
    """Records to record.jsonl in the run's folder, and from there to an MLflow store.

    `tracking_uri` is "sqlite:///FOLDER/mlflow.db" or a server; "" is the environment's
    MLFLOW_TRACKING_URI, or else runs/mlflow.db. New lines are sent every `send_seconds`; closing
    a run gives up on a store that stands still for `close_seconds`.
    """

    tracking_uri: str = ""
    experiment: str = "objective-zoo"
    send_seconds: float = 2.0
    close_seconds: float = 60.0

    def __post_init__(self) -> None:
        _ = self.store
        if not (self.send_seconds > 0 and self.close_seconds > 0):
            raise ValueError(
                f"mlflow.send_seconds = {self.send_seconds} and mlflow.close_seconds = "
                f"{self.close_seconds} must be above 0"
            )

    @property
    def store(self) -> Store:
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return Store.of(uri or "sqlite:///runs/mlflow.db", self.experiment)

    def start(
        self,
        name: str,
        folder: Path,
        parent: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Run:
        return Run(name, Path(folder), parent, tags or {}, self)


class NullRun:
    """A run of which nothing is kept."""

    def __init__(self, name: str):
        self.id = ""
        self.name = name

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, object]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def text(self, content: str, name: str) -> None: ...
    def artifact(self, path: Path | str) -> None: ...
    def close(self, status: str = "FINISHED") -> None: ...

    def child(self, name: str, folder: Path, tags: Mapping[str, str] | None = None) -> NullRun:
        return NullRun(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Run:
    """An open run; leaving its `with` block closes it as FINISHED, FAILED or KILLED."""

    def __init__(
        self,
        name: str,
        folder: Path,
        parent: Path | None,
        tags: Mapping[str, str],
        mlflow: Mlflow | None = None,
    ):
        self.name = name
        self.folder = folder
        self._mlflow = mlflow
        self._names: set[str] = set()  # known to be valid
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._closed = False
        if read_start(folder) is None:
            first = self._start_line(parent)
            self.id = first["id"]
        else:
            first = {"kind": "resume"}
            self.id = self._continue()
        self._file = RecordWriter(folder)
        self._file.append(**first, time=now_ms())
        self.tags(tags)
        self._follower = None
        if mlflow is not None:
            self._follower = Follower(Copy(folder, mlflow.store), mlflow.send_seconds)

    def params(self, values: Mapping[str, object]) -> None:
        """Settings of the run, by name. MLflow keeps the first value of a param.

        So one that changes when a run is resumed becomes the tag `changed.NAME`, with a warning.
        """
        texts = self._texts("param", values)
        known = {k: self._tags.get(f"changed.{k}", v) for k, v in self._params.items()}
        changed = {k: v for k, v in texts.items() if known.get(k, v) != v}
        for name, value in changed.items():
            _log.warning("run %s: %s was %s, now %s", self.name, name, known[name], value)
        if new := {k: v for k, v in texts.items() if k not in self._params}:
            self._file.append("params", values=new)
            self._params |= new
            self._keep_whole("params.json", self._params, MAX_PARAM_LENGTH)
        if changed:
            self.tags({f"changed.{name}": value for name, value in changed.items()})

    def tags(self, values: Mapping[str, object]) -> None:
        """Facts about the run, by name; a later value replaces an earlier one."""
        texts = self._texts("tag", values)
        if new := {k: v for k, v in texts.items() if self._tags.get(k) != v}:
            self._file.append("tags", values=new)
            self._tags |= new
            self._keep_whole("tags.json", self._tags, MAX_TAG_LENGTH)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers at a step; the first non-finite one also becomes the tag `non_finite.NAME`."""
        self._check_names("metric", values)
        floats = {name: float(value) for name, value in values.items()}
        self._file.append("metrics", step=int(step), time=now_ms(), values=numbers(floats))
        for name, value in floats.items():
            if not math.isfinite(value) and f"non_finite.{name}" not in self._tags:
                self.tags({f"non_finite.{name}": f"{value} at step {step}"})

    def text(self, content: str, name: str) -> None:
        """Write a file `name` into the run's folder, and record it as an artifact."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()) or name == RECORD:
            raise ValueError(f"text name {name!r} must be a path inside the run's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        self.artifact(path)

    def artifact(self, path: Path | str) -> None:
        """Record a file; it is read when it is sent, so leave it where it is."""
        path = Path(path).resolve()
        if not path.is_file():
            raise ValueError(f"artifact {path} is not a file")
        folder = self.folder.resolve()
        inside = path.is_relative_to(folder)
        self._file.append("artifact", path=str(path.relative_to(folder) if inside else path))

    def child(self, name: str, folder: Path, tags: Mapping[str, str] | None = None) -> Run:
        """Start a run below this one, recorded in the same way."""
        return Run(name, Path(folder), self.folder, tags or {}, self._mlflow)

    def close(self, status: str = "FINISHED") -> None:
        """Record how the run ended; with MLflow, send the rest or say how to send it later."""
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is not one of {', '.join(STATUSES)}")
        if self._closed:
            return
        self._closed = True
        self._file.append("end", status=status, time=now_ms())
        self._file.close()
        if self._mlflow is None or self._follower is None:
            return
        if trouble := self._follower.close(self._mlflow.close_seconds):
            _log.warning(
                "the MLflow store %s has no whole copy of the run %s (%s).\n"
                "The record is in %s. Send it later with\n    %s",
                *(self._mlflow.store.name, self.name, trouble, self.folder / RECORD),
                shlex.join(["objective-zoo", "send", str(self.folder)]),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._closed:
            return
        else:
            self.tags({"error": f"{kind.__name__}: {error}"})
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _start_line(self, parent: Path | None) -> dict[str, Any]:
        above = None
        if parent is not None:
            start = read_start(Path(parent))
            if start is None:
                raise ValueError(f"the parent's folder {parent} holds no record; start it first")
            above = {"id": start["id"], "folder": os.path.relpath(parent, self.folder)}
        store = self._mlflow.store if self._mlflow else None
        return {
            "kind": "start",
            "id": uuid.uuid4().hex,
            "name": self.name,
            "parent": above,
            "store": {"uri": store.name, "experiment": store.experiment} if store else None,
        }

    def _continue(self) -> str:
        record = read_record(self.folder)
        if record.name != self.name:
            raise ValueError(
                f"{self.folder} holds the record of the run {record.name!r}, not of {self.name!r}; "
                "choose another folder or the same name"
            )
        self._params, self._tags = dict(record.params), dict(record.tags)
        return record.id

    def _texts(self, kind: str, values: Mapping[str, object]) -> dict[str, str]:
        self._check_names(kind, values)
        return {name: str(value) for name, value in values.items()}

    def _check_names(self, kind: str, values: Mapping[str, object]) -> None:
        for name in values.keys() - self._names:
            _check_name(kind, name)
            self._names.add(name)

    def _keep_whole(self, name: str, values: Mapping[str, str], limit: int) -> None:
        """MLflow gets long texts cut; the file has them whole."""
        if any(len(value) > limit for value in values.values()):
            self.text(json.dumps(values, indent=1, ensure_ascii=False), name)


def _check_name(kind: str, name: str) -> None:
    """MLflow's rule, kept by every recorder, so that any record can be sent."""
    longest = 250 if kind == "tag" else 230  # room for `non_finite.` and `changed.`
    plain = re.fullmatch(r"[\w.\- :/]+", name) and len(name) <= longest
    if not plain or posixpath.normpath(name) != name or name.startswith(("/", "..")):
        raise ValueError(
            f"{kind} name {name!r} is not allowed: take up to {longest} letters, digits and "
            "'_ - . : /', not like a path that is absolute, ends in '/' or goes up"
        )
