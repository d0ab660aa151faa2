"""MLflow stores: how one is named, how it is opened, and which command shows its page.

A local store is a sqlite file with the artifacts in a folder beside it. Any other store is a server
with an address. mlflow takes seconds to import, so it is imported when a store is opened.

An address may hold a password. It is written as `***`, and found in the environment again: in
MLFLOW_TRACKING_URI, if that is the same address, or in MLFLOW_TRACKING_PASSWORD.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from benchmarks.locks import locked
from registry.protocols import StoredRun
from registry.secrets import concealed, revealed
from trainers.checkpoints.whole_files import whole_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI, PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"
CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", PASSWORD, "MLFLOW_TRACKING_TOKEN")
SQLITE = "sqlite:///"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """An MLflow tracking store and the experiment in it; made by `Store.of`."""

    uri: str = field(repr=False)  # may hold a password
    experiment: str

    @classmethod
    def of(cls, uri: str, experiment: str) -> Store:
        """The store at this address; ValueError for an address that MLflow does not take.

        The path of a sqlite file is made absolute. In it `%3F` stands for a question mark, and
        `%25` for a per cent sign that two hexadecimal digits follow.
        """
        if not uri.startswith("sqlite:"):
            try:
                scheme = urlsplit(uri).scheme
            except ValueError:  # an address that is no address, such as http://[host
                scheme = ""
            if scheme in ("", "file"):
                raise ValueError(
                    f"tracking_uri {concealed(uri)!r} is not an MLflow store; "
                    "give 'sqlite:///FOLDER/mlflow.db' or a server such as 'http://localhost:5000'"
                )
            return cls(uri, experiment)
        path = uri.removeprefix(SQLITE)
        if path == uri or not path or "?" in path:
            raise ValueError(
                f"tracking_uri {concealed(uri)!r} must be 'sqlite:///' and the path of a file, in "
                "which a question mark is written %3F"
            )
        return cls.in_file(Path(unquote(path)), experiment)

    @classmethod
    def in_file(cls, path: Path, experiment: str) -> Store:
        """The store in this sqlite file; ValueError for a path that is no UTF-8."""
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the MLflow store {str(path.absolute())!r} lies in a folder whose name is no "
                "UTF-8. Rename the folder, give another store as --tracking-uri, or bind "
                "run.recorder = @jsonl()"
            ) from None
        return cls(_sqlite_uri(path.absolute()), experiment)

    @property
    def name(self) -> str:
        """The uri with `***` for its password. Files and messages have only this."""
        return concealed(self.uri)

    @property
    def file(self) -> Path | None:
        """The database file of a sqlite store; None for a server."""
        path = self.uri.removeprefix(SQLITE)
        return None if path == self.uri else Path(unquote(path))

    @property
    def address(self) -> str:
        """The uri as MLflow is to be given it; ValueError where no password is known."""
        if self.file is not None:
            return _sqlite_address(self.file)
        return self.with_password()

    def with_password(self) -> str:
        """The uri with its password; ValueError where no password is known."""
        found = revealed(self.uri, PASSWORD)
        if found is None:
            raise ValueError(
                f"the MLflow store {self.name} was recorded without its password. Set {PASSWORD} "
                f"to the password or {URI} to the whole address, or give that as --tracking-uri"
            )
        return found

    def client(self) -> MlflowClient:
        """A client of the store. A sqlite store that does not exist yet is made first."""
        if self.file is None:
            return _import_mlflow().MlflowClient(self.address)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.file.with_name(self.file.name + ".lock")):
            if not self.file.exists():
                _make_tables(self.file)
            # A file that is no database fails here at once. MLflow would try for minutes.
            with closing(sqlite3.connect(self.file)) as connection:
                connection.execute("pragma schema_version")
            return _import_mlflow().MlflowClient(self.address)

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
        return shlex.join([str(beside), "ui", "--backend-store-uri", self.address])

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
        _import_mlflow().MlflowClient(_sqlite_address(new))


def _sqlite_uri(file: Path) -> str:
    return SQLITE + re.sub("[%?#]", lambda found: quote(found[0]), str(file))


def _sqlite_address(file: Path) -> str:
    """The uri by which SQLAlchemy opens this file. It reads %25 as % from version 2.1 on only."""
    from sqlalchemy import make_url

    for uri in (_sqlite_uri(file), f"{SQLITE}{file}"):
        if make_url(uri).database == str(file):
            return uri
    raise ValueError(f"this version of SQLAlchemy cannot open {file}; choose a path without '?'")


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
