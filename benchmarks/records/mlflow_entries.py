"""What MLflow gets of the lines of a record, within its limits and without secrets.

A record may come from somebody else, so a file that lies outside the folder of the run is not sent.
Names go through `mlflow_names`. MLflow stores an infinity as the largest float of its sign.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.records.jsonl import RECORD
from benchmarks.records.mlflow_names import MAX_NAME_LENGTH, stored_name
from registry.secrets import concealed

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
METRICS_PER_REQUEST = 1000  # the most that MLflow takes
TEXTS_PER_REQUEST = 10  # MLflow takes 100, but a request may not be above 1 MB
MAX_READ = 2**24  # bytes of a file in which secrets are looked for

T = TypeVar("T")
log = logging.getLogger(__name__)


def send_entries(
    client: MlflowClient, run_id: str, folder: Path, entries: list[dict[str, Any]]
) -> None:
    """Send lines of a record in few requests; raises what MLflow raises."""
    from mlflow.entities import Metric, Param, RunTag

    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    metrics: list[Metric] = []
    for entry in entries:
        match entry["kind"]:
            case "params":
                params.update(entry["values"])
            case "tags":
                tags.update(entry["values"])
            case "metrics":
                for name, value in entry["values"].items():
                    metrics.append(
                        Metric(_stored(name, tags), float(value), entry["time"], entry["step"])
                    )
    sent_params = [
        Param(_stored(k, tags), shortened(concealed(v), MAX_PARAM_LENGTH, "params"))
        for k, v in params.items()
    ]
    cut_tags = [
        RunTag(_stored(k, tags), shortened(concealed(v), MAX_TAG_LENGTH, "tags"))
        for k, v in list(tags.items())
    ]
    for some_params in _chunks(sent_params, TEXTS_PER_REQUEST):
        client.log_batch(run_id, params=some_params, synchronous=True)
    for some_tags in _chunks(cut_tags, TEXTS_PER_REQUEST):
        client.log_batch(run_id, tags=some_tags, synchronous=True)
    for some_metrics in _chunks(metrics, METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=some_metrics, synchronous=True)
    for entry in entries:
        _send_event(client, run_id, folder, entry)


def _send_event(client: MlflowClient, run_id: str, folder: Path, entry: dict[str, Any]) -> None:
    match entry["kind"]:
        case "artifact":
            _send_artifact(client, run_id, folder, entry["path"])
        case "end":
            client.set_terminated(run_id, entry["status"], end_time=entry["time"])
        case "resume":
            client.update_run(run_id, status="RUNNING")


def _send_artifact(client: MlflowClient, run_id: str, folder: Path, name: str) -> None:
    path = artifact_path(folder, name)
    if not path.is_file():
        log.warning("the artifact %s is gone, so MLflow does not get it", path)
        return
    text = _text(path)
    if text is not None and (hidden := concealed(text)) != text:
        log.warning("the artifact %s holds secrets; MLflow gets it with *** for them", path)
        client.log_text(run_id, hidden, name)
        return
    where = Path(name).parent.as_posix()
    client.log_artifact(run_id, str(path), None if where == "." else where)


def _text(path: Path) -> str | None:
    """The content of a text file; None for another file, and for a very large one."""
    if path.stat().st_size > MAX_READ:
        return None
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None


def artifact_path(folder: Path, name: str) -> Path:
    """The file that a record names; ValueError for one that lies outside the folder of the run."""
    path, inside = folder / name, False
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        try:
            inside = path.resolve().is_relative_to(folder.resolve())
        except (OSError, ValueError, RuntimeError):  # a loop of links, or a name that no file has
            inside = False
    if not inside:
        raise ValueError(
            f"{folder / RECORD} names the artifact {name!r}, which lies outside the folder of the "
            "run, itself or by a link. It is not sent, nor is anything beside it. If it is yours, "
            "copy it into the folder and correct the line"
        )
    return path


def _stored(name: str, tags: dict[str, str]) -> str:
    """The name for MLflow; where it is cut, a tag keeps the whole name."""
    stored = stored_name(concealed(name))
    if len(name) > MAX_NAME_LENGTH:
        tags[f"name{stored[-19:]}"] = name
    return stored


def shortened(text: str, limit: int, kind: str) -> str:
    """The text, or its beginning and a note in which artifact the whole of it is."""
    if len(text) <= limit:
        return text
    note = f" ... [cut; all {len(text)} characters are in the artifact {kind}.json]"
    return text[: limit - len(note)] + note


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
