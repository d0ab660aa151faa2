"""How far each cell is: read from its folder, or from the MLflow store if it finished elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.experiments.pruning import PRUNED
from benchmarks.records.jsonl import read_record, read_start
from benchmarks.records.mlflow_sync import reason
from benchmarks.runs.result import has_result
from registry.protocols import RecordStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """How far a cell is, in which folder; `note` says more, `commit` names the code that ran it."""

    status: Literal["new", "half-done", "finished", "failed", "pruned"]
    folder: Path
    note: str = ""
    commit: str = ""


def state_in(folder: Path) -> State:
    """The state of the cell in a folder.

    A cell that was killed after its result was written, and before its record was closed, is
    half-done.
    """
    result = has_result(folder)
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
    """The cells that have finished by the store, by id; {} and a warning if it does not answer."""
    try:
        found = store.finished(ids)
    except Exception as error:  # whatever the store's library and its transports raise
        log.warning(
            "the store of records %s does not answer (%s): only the folders here show which "
            "cells have finished",
            *(store.name, reason(error)),
        )
        return {}
    return {
        id: State(
            "finished", Path(run.tags.get("cell.folder", "")), run.name, run.tags.get("commit", "")
        )
        for id, run in found.items()
    }
