"""An open run: what is recorded of it goes to `record.jsonl`, and from there to MLflow.

The file comes first and is the truth. If there is an MLflow store, a background thread copies the
file to it. When the store cannot be reached, training goes on, and the copy is made later.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.records.jsonl import (
    RECORD,
    STATUSES,
    RecordWriter,
    now_ms,
    numbers,
    read_record,
    read_start,
)
from benchmarks.records.mlflow_entries import MAX_PARAM_LENGTH, MAX_TAG_LENGTH
from benchmarks.records.mlflow_store import Store
from benchmarks.records.mlflow_sync import Copy, Follower
from registry.secrets import concealed
from trainers.checkpoints.whole_files import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CopySettings:
    """Where the copy of a run goes, how often lines are sent, and how long closing waits."""

    store: Store
    send_seconds: float
    close_seconds: float


class NullRun:
    """A run of which nothing is recorded."""

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


class OpenRun:
    """A run that is recorded; the end of its `with` block closes it.

    It is closed as FINISHED, after an error as FAILED, and after an interruption as KILLED.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        parent: Path | None,
        tags: Mapping[str, str],
        copy: CopySettings | None = None,
    ):
        self.name = _as_text(name)
        self.folder = folder
        self._copy = copy
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
        if copy is not None:
            self._follower = Follower(Copy(folder, copy.store), copy.send_seconds)

    def params(self, values: Mapping[str, object]) -> None:
        """Record settings of the run, by name.

        MLflow never changes a param. So if a resumed run has another value, the first one stays the
        param, the new one becomes the tag `changed.NAME`, and a warning says so.
        """
        texts = self._texts("param", values)
        known = {k: self._tags.get(f"changed.{k}", v) for k, v in self._params.items()}
        changed = {k: v for k, v in texts.items() if known.get(k, v) != v}
        for name, value in changed.items():
            log.warning("run %s: %s was %s, now %s", self.name, name, known[name], value)
        if new := {k: v for k, v in texts.items() if k not in self._params}:
            self._file.append("params", values=new)
            self._params |= new
            self._keep_whole("params.json", self._params, MAX_PARAM_LENGTH)
        if changed:
            self.tags({f"changed.{name}": value for name, value in changed.items()})

    def tags(self, values: Mapping[str, object]) -> None:
        """Record facts about the run, by name; a later value replaces an earlier one."""
        texts = self._texts("tag", values)
        if new := {k: v for k, v in texts.items() if self._tags.get(k) != v}:
            self._file.append("tags", values=new)
            self._tags |= new
            self._keep_whole("tags.json", self._tags, MAX_TAG_LENGTH)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; ValueError, which names it, for a value that is no number.

        The first number of a name that is not finite also becomes the tag `non_finite.NAME`.
        """
        _check_names("metric", values)
        floats = {name: _number(name, value) for name, value in values.items()}
        self._file.append("metrics", step=int(step), time=now_ms(), values=numbers(floats))
        for name, value in floats.items():
            if not math.isfinite(value) and f"non_finite.{name}" not in self._tags:
                self.tags({f"non_finite.{name}": f"{value} at step {step}"})

    def text(self, content: str, name: str) -> None:
        """Write a file `name` into the run's folder, and record it as an artifact."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder.resolve()) or name == RECORD:
            raise ValueError(
                f"the text name {name!r} must be a path inside the run's folder, and not {RECORD}"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
        self.artifact(path)

    def artifact(self, path: Path | str) -> None:
        """Record a file of the run's folder. It is read when it is sent, so it must stay there.

        ValueError for a path that leads out of the folder, also by a link.
        """
        path = Path(path).resolve()
        if not path.is_file():
            raise ValueError(f"the artifact {path} is not a file; give the path of a file")
        folder = self.folder.resolve()
        if not path.is_relative_to(folder):
            raise ValueError(
                f"the artifact {path} lies outside the run's folder {folder}; copy it there"
            )
        self._file.append("artifact", path=path.relative_to(folder).as_posix())

    def child(self, name: str, folder: Path, tags: Mapping[str, str] | None = None) -> OpenRun:
        """Start a run whose parent is this one; it is recorded in the same way."""
        return OpenRun(name, Path(folder), self.folder, tags or {}, self._copy)

    def close(self, status: str = "FINISHED") -> None:
        """Record how the run ended, and send to MLflow what is left.

        If that fails, a warning says how to send it later. OSError for a finished run whose record
        is not whole because the disk is full.
        """
        if status not in STATUSES:
            raise ValueError(f"the status {status!r} must be one of {', '.join(STATUSES)}")
        if self._closed:
            return
        self._closed = True
        self._file.append("end", status=status, time=now_ms())
        lost = self._file.close()
        if self._copy is not None and self._follower is not None:
            self._send_rest(self._copy, self._follower)
        if lost and status == "FINISHED":
            raise OSError(
                f"{lost} lines of the record {self.folder / RECORD} could not be written: the "
                "disk is full"
            )

    def _send_rest(self, copy: CopySettings, follower: Follower) -> None:
        if trouble := follower.close(copy.close_seconds):
            log.warning(
                "the MLflow store %s has no whole copy of the run %s (%s).\n"
                "The record is in %s. Send it later with\n    %s",
                *(copy.store.name, self.name, trouble, self.folder / RECORD),
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
            failed = issubclass(kind, (Exception, SystemExit))
            self.close("FAILED" if failed else "KILLED")

    def _start_line(self, parent: Path | None) -> dict[str, Any]:
        above = None
        if parent is not None:
            start = read_start(Path(parent))
            if start is None:
                raise ValueError(
                    f"the parent's folder {parent} holds no record; start the parent first"
                )
            above = {"id": start["id"], "folder": os.path.relpath(parent, self.folder)}
        store = self._copy.store if self._copy else None
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
        if record.unreadable:
            log.warning(
                "%s: %d lines cannot be read and are skipped: %s",
                *(self.folder / RECORD, record.unreadable, record.unreadable_lines[:20]),
            )
        self._params, self._tags = dict(record.params), dict(record.tags)
        return record.id

    def _texts(self, kind: str, values: Mapping[str, object]) -> dict[str, str]:
        _check_names(kind, values)
        return {name: _as_text(value) for name, value in values.items()}

    def _keep_whole(self, name: str, values: Mapping[str, str], limit: int) -> None:
        """Write all values to a file if one is too long for MLflow, which gets it shortened."""
        if any(len(value) > limit for value in values.values()):
            self.text(json.dumps(values, indent=1, ensure_ascii=False), name)


def _check_names(kind: str, values: Mapping[str, object]) -> None:
    """ValueError for a name that is no text. MLflow gets any text, by `mlflow_names`."""
    for name in values:
        if not isinstance(name, str):
            raise ValueError(f"{kind} name {name!r} is not allowed: a name must be a text")


def _as_text(value: object) -> str:
    """Without secrets, and with escapes for halves of characters, as in names of folders."""
    return concealed(str(value)).encode(errors="backslashreplace").decode()


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"the metric {name!r} has the value {value!r}, which is no number ({error}). "
            "Give a float"
        ) from error
