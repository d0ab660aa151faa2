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

from benchmarks.records.mlflow_store import Store
from benchmarks.records.open_run import CopySettings, NullRun, OpenRun
from registry import recorders


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

    tracking_uri: str = ""  # "sqlite:///FOLDER/mlflow.db" or a server's address; "": see `store`
    experiment: str = "objective-zoo"
    send_seconds: float = 2.0  # between two looks for new lines that are to be sent
    close_seconds: float = 60.0  # without progress, after which closing a run stops sending

    def __post_init__(self) -> None:
        _ = self.store  # raises for a uri that is no store
        if not (self.send_seconds > 0 and self.close_seconds > 0):
            raise ValueError(
                f"mlflow.send_seconds = {self.send_seconds} and mlflow.close_seconds = "
                f"{self.close_seconds} must be above 0"
            )

    @property
    def store(self) -> Store:
        """Without a `tracking_uri`, the one of MLFLOW_TRACKING_URI, or else runs/mlflow.db."""
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        return Store.of(uri or "sqlite:///runs/mlflow.db", self.experiment)

    def start(
        self,
        name: str,
        folder: Path,
        parent: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> OpenRun:
        copy = CopySettings(
            store=self.store, send_seconds=self.send_seconds, close_seconds=self.close_seconds
        )
        return OpenRun(name, Path(folder), parent, tags or {}, copy)
