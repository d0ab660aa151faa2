"""Finds the runs of a report: in folders, or as MLflow runs whose folders are on this disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records.jsonl import RECORD, read_start
from benchmarks.records.mlflow_store import Store
from benchmarks.records.recorders import Mlflow

GRID, CELL = "grid.json", "cell.json"
_RUN_ID = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True)
class RunFolders:
    """The folders of runs that were `started`, and of cells that are only `prepared`.

    `notes` name what is missing. `groups` says which row a folder belongs to in the grid that the
    user gave, since a grid may use cells that another one has finished.
    """

    started: tuple[Path, ...]
    prepared: tuple[Path, ...]
    notes: tuple[str, ...]
    groups: Mapping[Path, str]


def folders_of(runs: Sequence[str | Path], tracking_uri: str = "") -> RunFolders:
    """Every run in or below these folders, and the cells that a grid found finished elsewhere."""
    notes: list[str] = []
    groups: dict[Path, str] = {}
    tops = [top for run in runs for top in _tops(run, tracking_uri)]
    folders = list(dict.fromkeys(f.resolve() for top in tops for f in _inside(top, notes, groups)))
    started = [folder for folder in folders if (folder / RECORD).exists()]
    prepared = [folder for folder in folders if folder not in started]
    return RunFolders(tuple(started), tuple(prepared), tuple(dict.fromkeys(notes)), groups)


def _tops(run: str | Path, tracking_uri: str) -> list[Path]:
    if Path(run).is_dir():
        return [Path(run)]
    if not _RUN_ID.match(str(run)):
        raise ValueError(f"{run} is no folder of runs, and no MLflow run id (32 hex digits)")
    return _of_mlflow(str(run), Mlflow(tracking_uri=tracking_uri).store_for(Path("runs") / run))


def _inside(top: Path, notes: list[str], groups: dict[Path, str]) -> Iterator[Path]:
    """The folders of runs, in the order of the grid that made them, else of their beginning."""
    for grid in sorted(top.rglob(GRID)):
        for cell in json.loads(grid.read_text())["cells"]:
            here = grid.parent / cell["name"]
            folder = here if here.is_dir() else Path(cell["folder"])
            if folder.is_dir():
                groups.setdefault(folder.resolve(), cell["group"])
                yield folder
            else:
                notes.append(f"{cell['name']} is in {folder}, which is not here: left out")
    records = [path.parent for path in top.rglob(RECORD)]
    yield from sorted(records, key=_began)
    yield from sorted(path.parent for path in top.rglob(CELL))


def _began(folder: Path) -> tuple[int, str]:
    start = read_start(folder)
    return (start["time"] if start else 0, str(folder))


def _of_mlflow(run_id: str, store: Store) -> list[Path]:
    """The folder of a cell, or those of the cells below a comparison."""
    from mlflow.exceptions import MlflowException

    client = store.client()
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise ValueError(
            f"the MLflow store {store.name} has no run {run_id}; name another store by "
            "--tracking-uri, or give the folder of the run"
        ) from error
    below = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=1000
    )
    known = [r for r in (run, *below) if "cell.folder" in r.data.tags]
    known.sort(key=lambda r: r.info.start_time)
    folders = [Path(r.data.tags["cell.folder"]) for r in known]
    if gone := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(
            f"the folders of the MLflow run {run_id} are not on this machine: {', '.join(gone)}. "
            "Copy them here and give the copies"
        )
    if not folders:
        raise ValueError(
            f"the MLflow run {run_id} names no folder of a cell, and no run below it does. Give "
            "the run of a cell or of a comparison"
        )
    return folders
