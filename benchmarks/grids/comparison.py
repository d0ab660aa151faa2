"""Runs what was planned, cell by cell in folders of their own, and puts the results side by side.

The folder of a comparison holds

    config.gin      the gin text of all cells
    grid.json       the axes, and each cell with its id, group, bindings, command and folder
    record.jsonl    the parent of the cells' records
    table.md  samples.png
    CELL/           see benchmarks/runs/execute.py; named by arm; in a grid with values and id
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.data.pictures import picture
from benchmarks.files import alone
from benchmarks.grids.axes import Declared
from benchmarks.grids.cell import CELL, Cell, run_cell
from benchmarks.grids.cell_status import State, finished_elsewhere, state_in
from benchmarks.grids.cells import Plan, Planned, plan
from benchmarks.grids.request import Request
from benchmarks.grids.result_table import average, result_table
from benchmarks.launchers.launcher import Job, close_lost
from benchmarks.launchers.subprocesses import Subprocesses
from benchmarks.records.mlflow_store import open_hint
from benchmarks.records.provenance import commit
from benchmarks.records.recorders import Mlflow
from benchmarks.runs.frame import frame
from benchmarks.runs.result import RESULT, SAMPLES, Result
from registry import gin_setup

GRID, LOCK = "grid.json", "grid.lock"
NUM_COLUMNS = 20  # samples per line of the picture


def compare(request: Request, out: Path, again: str, *, resume: bool = False) -> list[Result]:
    """Run every arm, or the one that is asked for; the results of those that finished.

    Arms that are finished already are not run again. One that fails is recorded and named, the
    others run; SystemExit(1) at the end. `again` is the command that goes on after a signal.
    """
    _check_folder(out, resume)
    arms, axes = request.arms(), request.declared()
    if axes and arms != ("",) and not request.arm:
        raise ValueError(
            f"{request.file} has axes ({', '.join(axes.keys)}). Run all its cells "
            f"with `{request.command('grid')}`, or with --arm one arm at the file's own values"
        )
    if axes:
        _say(f"one cell; `objective-zoo grid` runs those along {', '.join(axes.keys)}")
    planned = plan(request, Declared())
    with alone(out / LOCK, "a comparison"):
        states = {planned.cell.name: state_in(out / planned.cell.name) for planned in planned.cells}
        for one in planned.cells:
            if states[one.cell.name].status == "finished":
                _check_same(one, out / one.cell.name)
        return _run(planned, out, states, again, retry_failed=True)


def run_grid(
    request: Request,
    out: Path,
    again: str,
    *,
    workers: int | None = None,
    retry_failed: bool = False,
) -> list[Result]:
    """Run the cells that are finished neither in `out` nor, by the MLflow store, elsewhere.

    Those that failed before are left alone unless they are to be retried; else as `compare`.
    """
    _check_folder(out, resume=True)
    planned = plan(request, request.axes())
    if workers is not None:
        planned = replace(planned, launcher=Subprocesses(workers=workers))
    with alone(out / LOCK, "a comparison"):
        return _run(planned, out, states_of(planned, out), again, retry_failed=retry_failed)


def states_of(planned: Plan, out: Path) -> dict[str, State]:
    """How far each cell of a grid is, by name; ValueError for a folder of other settings."""
    states = {}
    for one in planned.cells:
        state = state_in(out / one.cell.name)
        if state.status != "new":
            _check_same(one, state.folder)
        states[one.cell.name] = state
    missing = {o.cell.id: o for o in planned.cells if states[o.cell.name].status != "finished"}
    if isinstance(planned.recorder, Mlflow):
        found = finished_elsewhere(planned.recorder.store, missing)
        states |= {missing[id].cell.name: state for id, state in found.items()}
    return states


def _run(
    planned: Plan, out: Path, states: Mapping[str, State], again: str, *, retry_failed: bool
) -> list[Result]:
    started = time.monotonic()
    for note in [*planned.notes, *_other_code(states.values())]:
        _say(note)
    jobs = []
    failed: dict[str, str] = {}
    for one in planned.cells:
        state = states[one.cell.name]
        if state.status == "failed" and not retry_failed:
            failed[one.cell.name] = f"{state.said} (before; --retry-failed runs it again)"
        elif state.status == "finished" or (state.status == "pruned" and one.prunes):
            _say(f"{one.cell.name}: {state.status} already{_where(state, out)}")
        else:
            jobs.append(Job(one.cell.name, _prepare(one, out / one.cell.name)))
    with planned.recorder.start(name=out.name, folder=out, tags={"grid": planned.name}) as parent:
        parent.text(planned.config, "config.gin")
        parent.text(_about(planned, states), GRID)
        failed |= _launch(planned, jobs, parent, again)
        results = _report(parent, planned, states, out)
        parent.close("FAILED" if failed else "FINISHED")
    _say_where(planned.recorder, out, time.monotonic() - started)
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {why}" for name, why in failed.items()))
    return results


def _launch(planned: Plan, jobs: Sequence[Job], parent: Any, again: str) -> dict[str, str]:
    """Run the jobs; why each failed that did."""
    failed = {}
    try:
        for number, ended in enumerate(planned.launcher(jobs, run_cell) if jobs else (), 1):
            why = f": {ended.reason}" if ended.reason else ""
            _say(f"{ended.name} {ended.status}, {number} of {len(jobs)}{why}")
            if ended.status == "failed":
                failed[ended.name] = ended.reason
                close_lost(next(j for j in jobs if j.name == ended.name), ended.reason, parent)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped; the same goes on with\n    {again}") from stop
    return failed


def _prepare(one: Planned, folder: Path) -> Path:
    where = {"cell.folder": str(folder.resolve())}
    replace(one.cell, tags={**one.cell.tags, **where}).save(folder, one.config)
    return folder


def _about(planned: Plan, states: Mapping[str, State]) -> str:
    """grid.json."""
    cells = [
        {
            "name": one.cell.name,
            "id": one.cell.id,
            "arm": one.cell.tags["arm"],
            "group": one.group,
            "bindings": one.bindings,
            "command": one.cell.tags["cell.command"],
            "folder": str(states[one.cell.name].folder.resolve()),
        }
        for one in planned.cells
    ]
    about = {**asdict(planned.axes), "notes": planned.notes, "cells": cells}
    return json.dumps({"grid": planned.name, **about}, indent=1) + "\n"


def _report(parent: Any, planned: Plan, states: Mapping[str, State], out: Path) -> list[Result]:
    """The table on the terminal and as table.md, and the picture of the first cell of each group.

    A row is the mean over the cells of a group, which differ in their seeds.
    """
    groups: dict[str, list[Path]] = {}
    for one in planned.cells:
        folder = states[one.cell.name].folder
        if (folder / RESULT).exists():
            groups.setdefault(one.group, []).append(folder)
    loaded = {group: [Result.load(f) for f in folders] for group, folders in groups.items()}
    if loaded:
        text = result_table(frame(loaded))
        print(f"\n{text}")
        parent.text(text, "table.md")
        rows = {
            f"{group} {key.removeprefix('nfe')}": samples[:NUM_COLUMNS]
            for group, (folder, *_) in groups.items()
            for key, samples in sorted(load_file(folder / SAMPLES).items(), key=_by_nfe)
        }
        if path := picture(rows, out / "samples.png"):
            parent.artifact(path)
    return [average(group, results) for group, results in loaded.items()]


def _by_nfe(item: tuple[str, Any]) -> int:
    return int(item[0].removeprefix("nfe"))


def _say_where(recorder: Any, out: Path, seconds: float) -> None:
    print(f"\n{seconds / 60:.1f} minutes")
    print(f"table     {out / 'table.md'}")
    if (out / "samples.png").exists():
        print(f"samples   {out / 'samples.png'}")
    print(f"gin text  {out}/*/config.gin, operative.gin")
    if isinstance(recorder, Mlflow):
        uri = recorder.store.name
        print(f"MLflow    {uri}; open it with\n          {open_hint(uri)}")


def _other_code(states: Iterable[State]) -> list[str]:
    """A warning of finished cells that another commit made: an id knows the version alone."""
    now = commit()
    made = [state.commit for state in states if state.status == "finished"]
    if not (others := [commit for commit in made if commit not in ("", now)]):
        return []
    return [
        f"{len(others)} finished cells are of other code (commit {', '.join(sorted(set(others)))}; "
        f"now {now}). To run them again, choose another --out and mlflow.experiment"
    ]


def _where(state: State, out: Path) -> str:
    """Where a cell is that is not in `out`."""
    if state.folder.parent.resolve() == out.resolve():
        return f" ({state.said})" if state.said else ""
    if (state.folder / RESULT).exists():
        return f" in {state.folder} ({state.said})"
    return (
        f" ({state.said}), but {state.folder} is not here, so the table lacks it. To run it again, "
        "delete that MLflow run or set another mlflow.experiment"
    )


def _check_same(one: Planned, folder: Path) -> None:
    """What was begun is kept: refuse to put other settings beside it, or on top of it."""
    if (folder / CELL).exists() and Cell.load(folder).id == one.cell.id:
        return
    if not (folder / "operative.gin").exists():
        return
    ours, theirs = (
        {
            key.removeprefix(f"{one.cell.arm}/"): value
            for key, value in gin_setup.bindings_of(text).items()
            if not key.split("/")[-1].startswith("mlflow.")
        }
        for text in (one.operative, (folder / "operative.gin").read_text())
    )
    differing = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
    shown = [f"{k} = {theirs.get(k, 'unset')}, now {ours.get(k, 'unset')}" for k in differing]
    if shown or (folder / CELL).exists():
        done = "finished" if (folder / RESULT).exists() else "half-done"
        raise ValueError(
            f"{folder} is {done} with other settings: "
            f"{'; '.join(shown[:5]) or 'other data, code or version of objective-zoo'}. "
            "Remove it to run it again, or choose another --out"
        )


def _check_folder(out: Path, resume: bool) -> None:
    there = {path.name for path in out.iterdir()} - {LOCK} if out.exists() else set()
    if there and not resume:
        raise ValueError(f"{out} is not empty: continue it with --resume, or choose another --out")
    if there and GRID not in there:
        raise ValueError(f"{out} holds something else than a comparison; choose another --out")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
