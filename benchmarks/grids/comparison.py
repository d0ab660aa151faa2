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
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.data.pictures import picture
from benchmarks.grids.axes import Declared
from benchmarks.grids.cell import run_cell
from benchmarks.grids.cell_status import State, finished_elsewhere, state_in
from benchmarks.grids.cells import Plan, Planned, plan
from benchmarks.grids.continuing import FORK, as_forked, check_same, fork, state_to_fork
from benchmarks.grids.outcome import CellsFailed, ComparisonOutcome, Row
from benchmarks.grids.rehearsal import PREFIX, rehearse, remove_leftovers
from benchmarks.grids.request import Request
from benchmarks.launchers.launcher import close_lost
from benchmarks.launchers.subprocesses import Subprocesses
from benchmarks.records.provenance import commit
from benchmarks.runs.result import SAMPLES, has_result
from registry import kinds
from registry.folders import check_output
from registry.protocols import Job, RunRecord, is_serial, store_of
from trainers.checkpoints.locks import alone

GRID, LOCK, TABLE, PICTURE = "grid.json", "grid.lock", "table.md", "samples.png"
NUM_COLUMNS = 20  # samples per line of the picture
NUM_ROWS = 20  # of the table, which the picture shows

log = logging.getLogger(__name__)


def compare(
    request: Request,
    out: Path,
    *,
    resume: bool = False,
    fork: Path | None = None,
    rehearsal: bool = True,
) -> ComparisonOutcome:
    """Run every arm, or those that the request names, after a rehearsal of them.

    Arms that are finished already are not run again. One that fails is recorded and the others
    run; CellsFailed at the end names it. After a signal KeyboardInterrupt is raised, and the same
    call with `resume` goes on. Each new run starts from the newest checkpoint of its namesake in
    the folder `fork`, or of the one run there, if it is given.
    """
    _check_folder(out, resume)
    remove_leftovers(out)
    if fork is not None and fork.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--fork {fork} cannot be continued inside itself; choose another --out")
    arms, axes = request.arms(), request.declared()
    if axes and arms != ("",) and not request.only:
        raise ValueError(
            f"{request.name} has axes ({', '.join(axes.keys)}). Run all its cells "
            f"with `{request.command('grid')}`, or with --arm one arm at the file's own values"
        )
    if axes:
        log.info("one cell; `objective-zoo grid` runs those along %s", ", ".join(axes.keys))
    planned = plan(request, Declared())
    states = {one.cell.name: state_in(out / one.cell.name) for one in planned.cells}
    if rehearsal:
        rehearse(_unfinished(planned, states), out, planned.launcher)
    with alone(out / LOCK, "a comparison"):
        states = {one.cell.name: state_in(out / one.cell.name) for one in planned.cells}
        if fork is not None:
            _fork(planned, fork, out, states)
        planned = replace(
            planned, cells=tuple(as_forked(one, out / one.cell.name) for one in planned.cells)
        )
        for one in planned.cells:
            if (state := states[one.cell.name]).status != "new":
                check_same(one, state.folder, may_change=state.status != "finished")
        return _run(planned, out, states, retry_failed=True)


def run_grid(
    request: Request,
    out: Path,
    *,
    workers: int | None = None,
    retry_failed: bool = False,
    rehearsal: bool = True,
) -> ComparisonOutcome:
    """Run the cells that have not finished in `out`, nor elsewhere in the same MLflow store.

    Cells that failed before run again only with `retry_failed`. The rest is as in `compare`; after
    a signal the same call goes on.
    """
    _check_folder(out, resume=True)
    remove_leftovers(out)
    planned = plan(request, request.axes())
    if workers is not None:
        planned = replace(planned, launcher=Subprocesses(workers=workers))
    if not is_serial(planned.launcher):
        _check_importable(planned.cells)
    if rehearsal:
        states = states_of(planned, out)
        rehearse(_unfinished(planned, states, retry_failed), out, planned.launcher)
    with alone(out / LOCK, "a comparison"):
        return _run(planned, out, states_of(planned, out), retry_failed=retry_failed)


def _unfinished(
    planned: Plan, states: Mapping[str, State], retry_failed: bool = True
) -> list[Planned]:
    """The cells that are to run."""
    done = {"finished"} if retry_failed else {"finished", "failed"}
    return [one for one in planned.cells if states[one.cell.name].status not in done]


def _check_importable(cells: Iterable[Planned]) -> None:
    """ValueError for a part of the notebook or script itself, which workers cannot import."""
    names = {name for one in cells for name in re.findall(r"@(?:\w+/)*(\w+)", one.operative)}
    own = [kind.get(name) for kind in kinds for name in sorted(names) if name in kind]
    if missing := [cls.__name__ for cls in own if cls.__module__ == "__main__"]:
        raise ValueError(
            f"{', '.join(missing)} is defined in the notebook or script itself, and the processes "
            "of the workers cannot import it. Put it into a file of its own, import that in the "
            "gin file (import my_loss), or run the cells in this process, without workers"
        )


def states_of(planned: Plan, out: Path) -> dict[str, State]:
    """How far each cell of a grid is, by name; ValueError for a folder of other settings."""
    states = {}
    for one in planned.cells:
        state = state_in(out / one.cell.name)
        if state.status != "new":
            check_same(one, state.folder, may_change=False)
        states[one.cell.name] = state
    missing = {o.cell.id: o for o in planned.cells if states[o.cell.name].status != "finished"}
    if store := store_of(planned.recorder, out):
        found = finished_elsewhere(store, missing)
        states |= {missing[id].cell.name: state for id, state in found.items()}
    return states


def _run(
    planned: Plan, out: Path, states: Mapping[str, State], *, retry_failed: bool
) -> ComparisonOutcome:
    started = time.monotonic()
    for note in [*planned.notes, *_other_code(states.values())]:
        log.info("%s", note)
    jobs = []
    failed: dict[str, str] = {}
    for one in planned.cells:
        state = states[one.cell.name]
        if state.status == "failed" and not retry_failed:
            failed[one.cell.name] = f"{state.note} (before; --retry-failed runs it again)"
        elif state.status == "finished" or (state.status == "pruned" and one.prunes):
            log.info("%s: %s already%s", one.cell.name, state.status, _where(state, out))
        else:
            jobs.append(Job(one.cell.name, _prepare(one, out / one.cell.name)))
    with planned.recorder.start(name=out.name, folder=out, tags={"grid": planned.name}) as parent:
        parent.text(planned.config, "config.gin")
        parent.text(_about(planned, states, out), GRID)
        failed |= _launch(planned, jobs, parent)
        comparison = ComparisonOutcome(
            folder=out,
            rows=_rows(planned, states),
            failed=failed,
            seconds=time.monotonic() - started,
            store=store_of(planned.recorder, out),
        )
        _keep(comparison, parent)
        parent.close("FAILED" if failed else "FINISHED")
    if failed:
        raise CellsFailed(failed, comparison)
    return comparison


def _launch(planned: Plan, jobs: Sequence[Job], parent: RunRecord) -> dict[str, str]:
    """Run the jobs; returns why each of those failed that did."""
    failed = {}
    for number, ended in enumerate(planned.launcher(jobs, run_cell) if jobs else (), 1):
        why = f": {ended.reason}" if ended.reason else ""
        log.info("%s %s, %d of %d%s", ended.name, ended.status, number, len(jobs), why)
        if ended.status == "failed":
            failed[ended.name] = ended.reason
            close_lost(next(j for j in jobs if j.name == ended.name), ended.reason, parent)
    return failed


def _prepare(one: Planned, folder: Path) -> Path:
    where = {"cell.folder": str(folder.resolve())}
    replace(one.cell, tags={**one.cell.tags, **where}).save(folder, one.config)
    return folder


def _about(planned: Plan, states: Mapping[str, State], out: Path) -> str:
    """The content of grid.json. Where only some arms run, the other arms' cells stay in it."""
    cells: list[dict[str, Any]] = [
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
    arms = {cell["arm"] for cell in cells}
    if not planned.whole and (out / GRID).exists():
        before = json.loads((out / GRID).read_text())["cells"]
        cells = [*(cell for cell in before if cell["arm"] not in arms), *cells]
    about = {**asdict(planned.axes), "notes": planned.notes, "cells": cells}
    return json.dumps({"grid": planned.name, **about}, indent=1) + "\n"


def _rows(planned: Plan, states: Mapping[str, State]) -> dict[str, Row]:
    """The rows in the order of the cells, with the runs that have finished."""
    rows: dict[str, Row] = {}
    for one in planned.cells:
        folder = states[one.cell.name].folder
        if has_result(folder):
            arm = one.cell.tags["arm"]
            row = rows.get(one.group) or Row(arm=arm, values=dict(one.values), folders=())
            rows[one.group] = replace(row, folders=(*row.folders, folder))
    return rows


def _keep(comparison: ComparisonOutcome, parent: RunRecord) -> None:
    """Write table.md, and a picture with the samples of the first run of each row.

    Samples of another shape, in a grid over data sets, have a picture of their own.
    Of a large grid the picture has the first rows alone: all of them would fill the memory.
    """
    if not comparison.rows:
        return
    parent.text(comparison.text(), TABLE)
    shown = [*comparison.rows.items()][:NUM_ROWS]
    if len(shown) < len(comparison.rows):
        log.info("%s shows the first %d rows of %d", PICTURE, NUM_ROWS, len(comparison.rows))
    by_shape: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, row in shown:
        for key, samples in sorted(load_file(row.folders[0] / SAMPLES).items(), key=_by_nfe):
            alike = by_shape.setdefault(tuple(samples.shape[1:]), {})
            alike[f"{name} {key.removeprefix('nfe')}"] = samples[:NUM_COLUMNS].clone()
    for number, (shape, rows) in enumerate(by_shape.items()):
        name = f"samples_{'x'.join(map(str, shape))}.png" if number else PICTURE
        if path := picture(rows, comparison.folder / name):
            parent.artifact(path)


def _by_nfe(item: tuple[str, Any]) -> int:
    return int(item[0].removeprefix("nfe"))


def _other_code(states: Iterable[State]) -> list[str]:
    """A warning of finished cells that another commit ran, since a cell's id ignores the commit."""
    now = commit()
    made = [state.commit for state in states if state.status == "finished"]
    if not (others := [commit for commit in made if commit not in ("", now)]):
        return []
    return [
        f"{len(others)} finished cells are of other code (commit {', '.join(sorted(set(others)))}; "
        f"now {now}). To run them again, choose another --out and mlflow.experiment"
    ]


def _where(state: State, out: Path) -> str:
    """Where a cell is, if it is not in `out`."""
    if state.folder.parent.resolve() == out.resolve():
        return f" ({state.note})" if state.note else ""
    if has_result(state.folder):
        return f" in {state.folder} ({state.note})"
    return (
        f" ({state.note}), but {state.folder} is not here, so the table lacks it. To run it again, "
        "delete that MLflow run or set another mlflow.experiment"
    )


def _fork(planned: Plan, source: Path, out: Path, states: Mapping[str, State]) -> None:
    """Give each new cell the state of its parent; nothing is copied if one has none."""
    new = [
        one
        for one in planned.cells
        if states[one.cell.name].status == "new" and not (out / one.cell.name / FORK).exists()
    ]
    found = [state_to_fork(one, source) for one in new]
    for one, checkpoint in zip(new, found, strict=True):
        fork(one, checkpoint, out / one.cell.name)


def _check_folder(out: Path, resume: bool) -> None:
    check_output(out, "--out", folder=True)
    names = {path.name for path in out.iterdir()} - {LOCK} if out.exists() else set()
    there = {name for name in names if not name.startswith(PREFIX)}  # of one that was killed
    if there and not resume:
        raise ValueError(
            f"{out} is not empty: continue it with resume (--resume), or choose another out"
        )
    if there and GRID not in there:
        raise ValueError(f"{out} holds something else than a comparison; choose another --out")
