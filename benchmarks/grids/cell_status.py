"""How far each cell is: read from its folder, or from the MLflow store if it finished elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.experiments.pruning import PRUNED
from benchmarks.records.jsonl import read_record, read_start
from benchmarks.records.mlflow_store import Store
from benchmarks.records.mlflow_sync import reason
from benchmarks.runs.result import RESULT

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


def finished_elsewhere(store: Store, ids: Iterable[str]) -> dict[str, State]:
    """The cells that have finished by the store, by id; {} and a warning if it does not answer."""
    if store.file is not None and not store.file.exists():
        return {}
    found = {}
    try:
        client = store.client()
        experiment = client.get_experiment_by_name(store.experiment)
        if experiment is None:
            return {}
        for wanted in ids:
            runs = client.search_runs(
                [experiment.experiment_id],
                f"tags.`cell.id` = '{wanted}' and attributes.status = 'FINISHED'",
                max_results=1,
            )
            for run in runs:
                folder, commit = (run.data.tags.get(t, "") for t in ("cell.folder", "commit"))
                note = f"MLflow run {run.info.run_id}"
                found[wanted] = State("finished", Path(folder), note, commit)
    except Exception as error:  # whatever MLflow and its transports raise
        log.warning(
            "the MLflow store %s does not answer (%s): finished cells are told by their folders "
            "here alone",
            *(store.name, reason(error)),
        )
    return found
