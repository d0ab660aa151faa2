"""MLflow stores: how one is named, how it is opened, and which command shows its page.

A local store is a sqlite file with the artifacts in a folder beside it. Any other store is a server
with an address. mlflow takes seconds to import, so it is imported when a store is opened.
"""

from __future__ import annotations

import logging
import os
import shlex
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from benchmarks.locks import locked
from registry.protocols import StoredRun
from trainers.checkpoints.whole_files import whole_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """An MLflow tracking store and the experiment in it; made by `Store.of`."""

    uri: str
    experiment: str

    @classmethod
    def of(cls, uri: str, experiment: str) -> Store:
        """The store at this address; ValueError for an address that MLflow does not take.

        The path of a sqlite file is made absolute.
        """
        if not uri.startswith("sqlite:"):
            if urlsplit(uri).scheme in ("", "file"):
                raise ValueError(
                    f"tracking_uri {uri!r} is not an MLflow store; "
                    "give 'sqlite:///FOLDER/mlflow.db' or a server such as 'http://localhost:5000'"
                )
            return cls(uri, experiment)
        path = uri.removeprefix("sqlite:///")
        if path == uri or not path:
            raise ValueError(f"tracking_uri {uri!r} must be 'sqlite:///' and the path of a file")
        file = Path(path).absolute()
        if "?" in str(file):  # whatever follows it is taken for options of the database
            raise ValueError(
                f"the MLflow store {str(file)!r} cannot be opened: its path must have no '?'. "
                "Bind mlflow.tracking_uri to another one, or work in another folder"
            )
        return cls(f"sqlite:///{file}", experiment)

    @property
    def name(self) -> str:
        """The uri without its password. Files and messages have only this."""
        parts = urlsplit(self.uri)
        return self.uri.replace(f":{parts.password}@", "@") if parts.password else self.uri

    @property
    def file(self) -> Path | None:
        """The database file of a sqlite store; None for a server."""
        path = self.uri.removeprefix("sqlite:///")
        return None if path == self.uri else Path(path)

    def client(self) -> MlflowClient:
        """A client of the store. A sqlite store that does not exist yet is made first."""
        if self.file is None:
            return _import_mlflow().MlflowClient(self.uri)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.file.with_name(self.file.name + ".lock")):
            if not self.file.exists():
                _make_tables(self.file)
            # A file that is no database fails here at once. MLflow would try for minutes.
            with closing(sqlite3.connect(self.file)) as connection:
                connection.execute("pragma schema_version")
            return _import_mlflow().MlflowClient(self.uri)

    def experiment_id(self, client: MlflowClient) -> str:
        """The id of the experiment, which is made if it does not exist.

        Beside a sqlite database there is a folder for the artifacts of its experiments.
        """
        from mlflow.exceptions import MlflowException

        if found := client.get_experiment_by_name(self.experiment):
            return found.experiment_id
        location = (self.file.parent / "mlartifacts").as_uri() if self.file else None
        try:
            return client.create_experiment(self.experiment, artifact_location=location)
        except MlflowException as error:
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                raise
            log.debug("another process made the experiment first: %s", error)
            return found.experiment_id

    def open_hint(self) -> str:
        """The command that opens the store's page in a browser, or the page's address."""
        if self.file is None:
            return self.name
        beside = Path(sys.executable).with_name("mlflow")
        return shlex.join([str(beside), "ui", "--backend-store-uri", self.uri])

    def finished(self, ids: Iterable[str]) -> dict[str, StoredRun]:
        """The finished cells among those with these ids, by id; raises what MLflow raises."""
        if self.file is not None and not self.file.exists():
            return {}
        client = self.client()
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return {}
        found = {}
        for wanted in ids:
            runs = client.search_runs(
                [experiment.experiment_id],
                f"tags.`cell.id` = '{wanted}' and attributes.status = 'FINISHED'",
                max_results=1,
            )
            for run in runs:
                found[wanted] = StoredRun(f"MLflow run {run.info.run_id}", run.data.tags)
        return found


def _make_tables(file: Path) -> None:
    """Make a new store, which appears only when it is whole.

    MLflow cannot open a database that a killed process left half-made.
    """
    with whole_file(file) as new:
        _import_mlflow().MlflowClient(f"sqlite:///{new}")


def _import_mlflow() -> Any:
    """mlflow, set up so that it sends no telemetry, logs no notes and does not retry requests."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    import mlflow

    # It logs a traceback for every error of the database, although it raises the error too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow
