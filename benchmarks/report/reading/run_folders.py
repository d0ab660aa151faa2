"""Finds the runs of a report: in folders, or as MLflow runs whose folders are on this disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records.jsonl import RECORD, read_start
from benchmarks.records.mlflow_store import Store
from benchmarks.records.recorders import Mlflow

GRID, CELL = "grid.json", "cell.json"
_RUN_ID = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True)
class RunFolders:
    """The folders of runs that were `started`, and of cells that are only `prepared`.

    `notes` name what is not counted. `groups` says which row a folder belongs to in the grid that
    the user gave, since a grid may use cells that another one has finished. `modes` has that grid's
    mode. `missing` are cells that a grid found finished in folders that are not here any more.
    """

    started: tuple[Path, ...]
    prepared: tuple[Path, ...]
    notes: tuple[str, ...]
    groups: Mapping[Path, str]
    modes: Mapping[Path, str]
    missing: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Found:
    """What the grids below a folder say."""

    notes: list[str] = field(default_factory=list)
    groups: dict[Path, str] = field(default_factory=dict)
    modes: dict[Path, str] = field(default_factory=dict)
    missing: list[Mapping[str, Any]] = field(default_factory=list)


def folders_of(runs: Sequence[str | Path], tracking_uri: str = "") -> RunFolders:
    """Every run in or below these folders, and the cells that a grid found finished elsewhere."""
    known = _Found()
    tops = [top for run in runs for top in _tops(run, tracking_uri)]
    folders = list(dict.fromkeys(f.resolve() for top in tops for f in _inside(top, known)))
    started = [folder for folder in folders if (folder / RECORD).exists()]
    prepared = [folder for folder in folders if folder not in started]
    return RunFolders(
        started=tuple(started),
        prepared=tuple(prepared),
        notes=tuple(dict.fromkeys(known.notes)),
        groups=known.groups,
        modes=known.modes,
        missing=tuple(known.missing),
    )


def _tops(run: str | Path, tracking_uri: str) -> list[Path]:
    if Path(run).is_dir():
        return [Path(run)]
    if not _RUN_ID.match(str(run)):
        raise ValueError(f"{run} is no folder of runs, and no MLflow run id (32 hex digits)")
    return _of_mlflow(str(run), Mlflow(tracking_uri=tracking_uri).store_for(Path("runs") / run))


def _inside(top: Path, found: _Found) -> Iterator[Path]:
    """The folders of runs, in the order of the grid that made them, else of their beginning.

    What lies in the folder of a grid and is none of its cells is named and left out.
    """
    cells_of: dict[Path, set[str]] = {}
    for grid in sorted(top.rglob(GRID)):
        if (about := _grid(grid, found.notes)) is None:
            continue
        cells_of[grid.parent] = {cell["name"] for cell in about["cells"]}
        for cell in about["cells"]:
            here = grid.parent / cell["name"]
            folder = here if here.is_dir() else Path(cell["folder"])
            if folder.is_dir():
                found.groups.setdefault(folder.resolve(), cell["group"])
                found.modes.setdefault(folder.resolve(), about.get("mode", "product"))
                yield folder
            else:
                found.missing.append({**cell, "folder": str(folder)})
    records = sorted((path.parent for path in top.rglob(RECORD)), key=_began)
    for folder in [*records, *sorted(path.parent for path in top.rglob(CELL))]:
        if folder.name in cells_of.get(folder.parent, {folder.name}):
            yield folder
        else:
            found.notes.append(
                f"{folder} is no longer a cell of the grid in {folder.parent}: it is not counted. "
                "Give its folder to the report, too, if it is to count"
            )


def _grid(file: Path, notes: list[str]) -> dict[str, Any] | None:
    """The content of grid.json; None, with a note, where it cannot be read."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        for cell in about["cells"]:
            if Path(cell["name"]).name != cell["name"] or not isinstance(cell["group"], str):
                raise ValueError("a cell has no plain name or group")
            Path(cell["folder"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        notes.append(f"{file} cannot be read: the runs beside it are counted as they lie there")
        return None
    return dict(about)


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
