"""Copies a run's record to an MLflow store; the record in the run's folder is the truth.

The record is sent line by line. For each store, `record.sent.json` beside the record notes the id
of the MLflow run and how many bytes of the record were sent.

If a process is killed after it sent lines and before it noted them, the same lines are sent again.
That changes nothing. MLflow keeps a metric point of the same key, step, time and value only once,
it accepts a param or a tag again if its value is the same, and the MLflow run is found again by its
tag `objective_zoo.run`.

A record may come from somebody else. So nothing is sent that lies outside its folder, no secret is
sent, and the credentials of the environment go only to a server that the user names.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.locks import locked
from benchmarks.records.jsonl import RECORD, read_lines, read_start
from benchmarks.records.mlflow_entries import (
    MAX_TAG_LENGTH,
    METRICS_PER_REQUEST,
    artifact_path,
    send_entries,
    shortened,
)
from benchmarks.records.mlflow_names import MAX_NAME_LENGTH
from benchmarks.records.mlflow_store import CREDENTIALS, URI, Store
from registry.secrets import concealed
from trainers.checkpoints.whole_files import write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

ID_TAG = "objective_zoo.run"
SENT = "record.sent.json"
LOCK = "record.lock"

log = logging.getLogger(__name__)


class Copy:
    """The copy of one run's record in one store."""

    def __init__(self, folder: Path, store: Store):
        self.folder = folder
        self.store = store
        self._client: MlflowClient | None = None

    def send_some(self) -> bool:
        """Send the next lines; False if there were none.

        An error of any kind, from MLflow or from its connection, is raised to the caller.
        """
        client, self._client = self._client, None  # after an error, the next call opens a new one
        with locked(self.folder / LOCK):
            if client is None:
                client = self.store.client()
                _ensure_run(client, self.store, self.folder)
            run_id, offset = _read_sent(self.folder)[self.store.name]
            entries, end = _next_entries(self.folder / RECORD, offset)
            if entries:
                send_entries(client, run_id, self.folder, entries)
            if end > offset:
                _note_sent(self.folder, self.store, run_id, end)
        self._client = client
        return end > offset


class Follower:
    """A background thread that keeps a copy up to date.

    While the store cannot be reached, it tries again after waits that become longer.
    """

    def __init__(self, copy: Copy, seconds: float, max_wait: float = 60.0):
        self._copy = copy
        self._seconds = seconds
        self._max_wait = max_wait
        self._closing = threading.Event()
        self._moved = time.monotonic()
        self._warned = False
        self._trouble: str | None = "not sent yet"
        self._thread = threading.Thread(target=self._follow, name="mlflow-copy", daemon=True)
        self._thread.start()

    def close(self, patience: float) -> str | None:
        """Send what is left, and end; None if all was sent, otherwise the reason why not.

        There is one attempt. It is given up after `patience` seconds without progress.
        """
        self._moved = time.monotonic()
        self._closing.set()
        while self._thread.is_alive():
            if time.monotonic() - self._moved > patience:
                return f"no answer for {patience:g} s"
            self._thread.join(0.05)
        return self._trouble

    def _follow(self) -> None:
        wait = self._seconds
        while True:
            last = self._closing.is_set()  # asked before sending: by then every line is written
            try:
                while self._copy.send_some():
                    self._moved = time.monotonic()
                self._reached()
                wait = self._seconds
            except Exception as error:  # noted and warned of; training goes on
                self._away(error)
                wait = min(2 * wait, self._max_wait)
            if last:
                return
            self._closing.wait(wait)

    def _reached(self) -> None:
        if self._warned and self._trouble:
            log.info("the MLflow store %s is back", self._copy.store.name)
        self._trouble = None

    def _away(self, error: Exception) -> None:
        self._trouble = reason(error)
        if not self._warned:
            self._warned = True
            log.warning(
                "cannot send to the MLflow store %s (%s). The run goes on and is recorded in %s; "
                "sending will be tried again.",
                *(self._copy.store.name, self._trouble, self._copy.folder / RECORD),
            )


def send(folder: Path | str, tracking_uri: str | None = None) -> list[tuple[Path, str]]:
    """Send every record in a folder and below it; gives the run folders and their MLflow run ids.

    A record goes to the store that it names, unless `tracking_uri` gives another one. Lines that
    were sent already are not sent again.
    """
    folder = Path(folder)
    records = sorted(folder.rglob(RECORD), key=lambda path: (len(path.parts), path))
    if not records:
        raise ValueError(f"no {RECORD} in {folder}; give a run's folder, or one that holds runs")
    found: list[tuple[Path, Store]] = []
    for run_folder in (path.parent for path in records):
        start = read_start(run_folder)
        if start is None:
            log.warning("%s has no readable start line and is not sent", run_folder / RECORD)
            continue
        found.append((run_folder, _store_of(run_folder, start, tracking_uri)))
    for run_folder, store in found:  # before anything of any record is sent
        _check_artifacts(run_folder)
        store.with_password()
    sent = []
    for run_folder, store in found:
        try:
            copy = Copy(run_folder, store)
            while copy.send_some():
                pass
        except Exception as error:  # MLflow and its connections raise errors of any kind
            raise ConnectionError(
                f"could not send {run_folder} to {store.name} ({reason(error)}). Nothing is lost: "
                "send again when the store is there; what has arrived is not sent twice."
            ) from None  # the error itself may show the password of the store
        sent.append((run_folder, _read_sent(run_folder)[store.name][0]))
    return sent


def reason(error: Exception) -> str:
    """The error in one line of at most 300 characters, without secrets."""
    lines = concealed(str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _ensure_run(client: MlflowClient, store: Store, folder: Path) -> str:
    """The id of the record's MLflow run, which is noted beside the record.

    The run may be noted already, or be found by its tag; otherwise it is made.
    """
    from mlflow.exceptions import MlflowException

    if known := _read_sent(folder).get(store.name):
        try:
            return client.get_run(known[0]).info.run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise  # the run is gone only if the store was emptied; then it is made anew
    start = read_start(folder)
    if start is None:
        raise ValueError(f"{folder / RECORD} is missing or has no start line")
    experiment = store.experiment_id(client)
    found = client.search_runs([experiment], f"tags.`{ID_TAG}` = '{start['id']}'", max_results=1)
    if found:
        run_id = found[0].info.run_id
    else:
        run_id = _create_run(client, store, folder, start, experiment)
    _note_sent(folder, store, run_id, 0)
    return run_id


def _create_run(
    client: MlflowClient, store: Store, folder: Path, start: dict[str, Any], experiment: str
) -> str:
    tags = {ID_TAG: start["id"]}
    if parent := _parent_of(folder, start):
        with locked(parent / LOCK):
            tags["mlflow.parentRunId"] = _ensure_run(client, store, parent)
    name = concealed(start["name"])
    if len(name) > MAX_NAME_LENGTH:
        tags["objective_zoo.name"] = shortened(name, MAX_TAG_LENGTH, "tags")
        name = name[:MAX_NAME_LENGTH]
    run = client.create_run(experiment, start_time=start["time"], tags=tags, run_name=name)
    return run.info.run_id


def _parent_of(folder: Path, start: dict[str, Any]) -> Path | None:
    """The folder of the parent, where its record has the id that this record names."""
    if not start["parent"]:
        return None
    parent = Path(os.path.normpath(folder / start["parent"]["folder"]))
    theirs = read_start(parent)
    if theirs is not None and theirs["id"] == start["parent"]["id"]:
        return parent
    log.warning("%s holds no record of the parent of %s, so MLflow has it alone", parent, folder)
    return None


def _next_entries(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The next lines, about as many as one request takes, and the offset of the line after them."""
    entries: list[dict[str, Any]] = []
    size = 0
    for entry, end in read_lines(path, offset):
        offset = end
        if entry is None:
            log.warning("%s: the line that ends at byte %d cannot be read, not sent", path, end)
            continue
        entries.append(entry)
        size += len(entry.get("values", ()))
        if size >= METRICS_PER_REQUEST:
            break
    return entries, offset


def _check_artifacts(folder: Path) -> None:
    """ValueError if the record names an artifact outside the folder."""
    for entry, _ in read_lines(folder / RECORD):
        if entry is not None and entry["kind"] == "artifact":
            artifact_path(folder, entry["path"])


def _store_of(folder: Path, start: dict[str, Any], tracking_uri: str | None) -> Store:
    recorded = start["store"] or {"uri": None, "experiment": "objective-zoo"}
    uri = tracking_uri or recorded["uri"]
    if uri is None:
        raise ValueError(f"the record in {folder} names no MLflow store; give a tracking uri")
    store = Store.of(uri, recorded["experiment"])
    held = [name for name in CREDENTIALS if os.environ.get(name)]
    own = tracking_uri or concealed(os.environ.get(URI, "")) == store.name
    if held and store.file is None and not own:
        raise ValueError(
            f"the record in {folder} names the MLflow server {store.name}, and what "
            f"{', '.join(held)} of the environment hold would be sent there. If you trust it, give "
            f"--tracking-uri {store.name}"
        )
    return store


def _read_sent(folder: Path) -> dict[str, tuple[str, int]]:
    """What was noted, by the name of the store; {} and a warning for a file that cannot be read."""
    path = folder / SENT
    if not path.exists():
        return {}
    try:
        found = {str(name): (str(id), int(end)) for name, (id, end) in _object(path).items()}
    except (ValueError, TypeError, OverflowError, RecursionError):
        log.warning("%s cannot be read, so %s is sent from its beginning", path, folder / RECORD)
        return {}
    return found


def _object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _note_sent(folder: Path, store: Store, run_id: str, offset: int) -> None:
    sent = _read_sent(folder) | {store.name: (run_id, offset)}
    write_json(folder / SENT, sent)
