"""How far each cell is, by its folder and, where another folder finished it, by the store."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.experiments.pruning import PRUNED
from benchmarks.records.jsonl import read_record, read_start
from benchmarks.records.mlflow_sync import reason
from benchmarks.runs.result import RESULT
from registry.protocols import RecordStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """`folder` is where the cell is or will be; `said` tells more, `commit` which code made it."""

    status: Literal["new", "half-done", "finished", "failed", "pruned"]
    folder: Path
    said: str = ""
    commit: str = ""


def state_in(folder: Path) -> State:
    """The state of the cell in a folder; one killed behind its result is half-done."""
    result = (folder / RESULT).exists()
    if read_start(folder) is None:
        return State("finished" if result else "new", folder)
    record = read_record(folder)
    if result and record.status == "FINISHED":
        return State("finished", folder, commit=record.tags.get("commit", ""))
    if record.status == "FAILED":
        return State("failed", folder, record.tags.get("error", "no reason recorded"))
    if record.status == "KILLED" and record.tags.get(PRUNED):
        return State("pruned", folder, record.tags[PRUNED])
    return State("half-done", folder)


def finished_elsewhere(store: RecordStore, ids: Iterable[str]) -> dict[str, State]:
    """The cells, by id, that the store knows as finished; {} with a warning if it is away."""
    try:
        found = store.finished(ids)
    except Exception as error:  # whatever the store's library and its transports raise
        log.warning(
            "the store of records %s does not answer (%s): finished cells are told by their "
            "folders here alone",
            *(store.name, reason(error)),
        )
        return {}
    return {
        id: State(
            "finished", Path(run.tags.get("cell.folder", "")), run.name, run.tags.get("commit", "")
        )
        for id, run in found.items()
    }
