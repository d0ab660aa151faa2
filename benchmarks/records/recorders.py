"""Recorders: the settings that say where the record of a run goes.

    null    nowhere
    jsonl   record.jsonl in the run's folder
    mlflow  the same file, and a background thread copies it to an MLflow store

A recorder is configuration; its `start` opens a run (open_run.py). If the folder holds a record
already, the run continues it, under the same id and in the same MLflow run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.records.jsonl import read_start
from benchmarks.records.mlflow_store import SQLITE, URI, Store
from benchmarks.records.open_run import CopySettings, NullRun, OpenRun
from registry import recorders

STORE_FILE = "mlflow.db"
MAX_EXPERIMENT_LENGTH = 500  # of MLflow


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
    ) -> OpenRun:
        return OpenRun(name, Path(folder), parent, tags or {})


@recorders.register("mlflow")
@dataclass(frozen=True, kw_only=True)
class Mlflow:
    """Records to record.jsonl in the run's folder, and copies that to an MLflow store."""

    takes_secrets: ClassVar = ("tracking_uri",)

    tracking_uri: str = ""  # a server, or "sqlite:///FOLDER/mlflow.db"; "": see `store_for`
    experiment: str = "objective-zoo"
    send_seconds: float = 2.0  # between two looks for new lines that are to be sent
    close_seconds: float = 60.0  # without progress, after which closing a run stops sending

    def __post_init__(self) -> None:
        _ = self.store_for(Path())  # raises for a uri that is no store
        if not (self.experiment and len(self.experiment) <= MAX_EXPERIMENT_LENGTH):
            raise ValueError(
                f"mlflow.experiment = {self.experiment!r} must have 1 to {MAX_EXPERIMENT_LENGTH} "
                "characters"
            )
        if not (self.send_seconds > 0 and self.close_seconds > 0):
            raise ValueError(
                f"mlflow.send_seconds = {self.send_seconds} and mlflow.close_seconds = "
                f"{self.close_seconds} must be above 0"
            )

    def store_for(self, folder: Path) -> Store:
        """The store of a run, or of a comparison of runs, in this folder.

        That is `tracking_uri`, else MLFLOW_TRACKING_URI, else the local store that the folder's
        record names, else the file mlflow.db beside the folder.
        """
        if uri := self.tracking_uri or os.environ.get(URI, ""):
            return Store.of(uri, self.experiment)
        beside = Store.in_file(folder.absolute().parent / STORE_FILE, self.experiment)
        return _recorded(folder, self.experiment) or beside

    def start(
        self,
        name: str,
        folder: Path,
        parent: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> OpenRun:
        store = self.store_for(Path(parent or folder))
        store.with_password()  # raises where it is not known
        copy = CopySettings(
            store=store, send_seconds=self.send_seconds, close_seconds=self.close_seconds
        )
        return OpenRun(name, Path(folder), parent, tags or {}, copy)


def _recorded(folder: Path, experiment: str) -> Store | None:
    """The local store that the record in the folder names, if it is there."""
    start = read_start(folder)
    if not (start and start["store"] and start["store"]["uri"].startswith(SQLITE)):
        return None
    store = Store.of(start["store"]["uri"], experiment)
    return store if store.file and store.file.is_file() else None
