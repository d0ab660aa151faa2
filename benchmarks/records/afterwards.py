"""What is found about a run after its end, added to its record and to the copy in MLflow."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.locks import locked
from benchmarks.records.jsonl import RecordWriter, now_ms, numbers, read_start
from benchmarks.records.mlflow_store import Store
from benchmarks.records.mlflow_sync import LOCK, reason, send
from registry.secrets import concealed

log = logging.getLogger(__name__)


def add_to_record(
    folder: Path,
    *,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
    step: int,
    files: Sequence[Path],
) -> None:
    """Add to the record of an ended run, whose status stays; files outside its folder are left out.

    A folder without a record stays without one. If the record or the store cannot be written, a
    warning says so, since what was found is in files already.
    """
    start = read_start(folder)
    if start is None:
        return
    inside = [f.resolve() for f in files if f.resolve().is_relative_to(folder.resolve())]
    try:
        with locked(folder / LOCK):
            record = RecordWriter(folder)
            record.append("tags", values={name: concealed(text) for name, text in tags.items()})
            record.append("metrics", step=step, time=now_ms(), values=numbers(metrics))
            for file in inside:
                record.append("artifact", path=file.relative_to(folder.resolve()).as_posix())
            record.close()
    except OSError as error:
        log.warning("the record in %s cannot be added to (%s)", folder, error)
        return
    if start["store"] is None:
        return
    again = shlex.join(["objective-zoo", "send", str(folder)])
    try:
        database = Store.of(start["store"]["uri"], start["store"]["experiment"]).file
        if database is None or database.is_file():
            send(folder)
        else:
            log.warning("the MLflow store %s is gone, so it does not get this", database)
    except Exception as error:  # MLflow and its connections raise errors of any kind
        log.warning("not sent to MLflow (%s); send it later with\n    %s", reason(error), again)
