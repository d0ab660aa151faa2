"""Rehearses the cells of a comparison before the first of them trains.

A cell is prepared in a folder of its own, as for its run, inside the folder of the comparison and
for the time of the rehearsal alone. It is built from the text that it would keep, which must bind
what was planned, and gone through by benchmarks/runs/rehearsal.py, in every process of the run.
Cells that differ in their seed alone are rehearsed once. What is wrong is said for all of them at
once.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.grids.cell import CONFIG, Cell, built, lead, recorder_of, texts_of
from benchmarks.grids.cells import Planned
from benchmarks.grids.result_table import result_table
from benchmarks.records.recorders import Jsonl, Mlflow
from benchmarks.runs import rehearsal
from benchmarks.runs.frame import frame
from registry import engines, gin_setup, progress
from registry.protocols import (
    Engine,
    Launcher,
    Recorder,
    RunRecord,
    group_of,
    runs_in_several_processes,
)
from trainers import ranks
from trainers.checkpoints.locks import alone

PREFIX = ".rehearsal-"
_TAKING, _LIVE = "lock", "live"
_LONGEST = 24 * 3600  # seconds

log = logging.getLogger(__name__)


def rehearse(cells: Sequence[Planned], out: Path, launcher: Launcher) -> None:
    """ValueError lists what would end any of these cells; nothing of the rehearsal is left."""
    kinds = {_kind(one): one for one in reversed(cells)}
    chosen = list(reversed(kinds.values()))
    if not chosen:
        return
    log.info("rehearsing %s at its smallest ...", _counted(len(chosen)))
    troubles: dict[str, list[str]] = {}
    shown = progress.bar(chosen, "rehearsing", worth=len(chosen) > 3, leave=False, disable=None)
    with gin_setup.isolated(), _place(out) as folder:
        for one in shown:
            if trouble := _trouble(one, folder / one.cell.name, launcher):
                troubles.setdefault(trouble, []).append(one.cell.name)
            shutil.rmtree(folder / one.cell.name, ignore_errors=True)
    if troubles:
        lines = [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {trouble}"
            for trouble, names in troubles.items()
        ]
        raise ValueError(
            "the rehearsal failed, so nothing was trained (--no-rehearsal, or rehearsal=False in "
            "Python, trains without one):\n" + "\n".join(lines)
        )


def _kind(one: Planned) -> frozenset[tuple[str, str]]:
    """What took effect in a cell, but its seed."""
    bound = gin_setup.bindings_of(one.operative)
    return frozenset(pair for pair in bound.items() if pair[0].split("/")[-1] != "run.seed")


def _counted(number: int) -> str:
    return "the run" if number == 1 else f"{number} kinds of cells, each"


def _trouble(one: Planned, folder: Path, launcher: Launcher) -> str:
    """What would end the cell; '' if nothing was found."""
    work = _Rehearsal(operative=one.operative, ranks=getattr(launcher, "ranks", 1))
    trouble = ""
    while work.attempt < work.attempts:
        place = folder / str(work.attempt)
        one.cell.save(place, one.config)
        try:
            gin_setup.parse([place / CONFIG])
            recorder = _in_place_of(recorder_of(one.cell.arm))
            with recorder.start(one.cell.name, place, None, one.cell.tags) as record:
                lead(work, one.cell, place, record)
            return ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a part of the user's may also end the process
            trouble = rehearsal.cause(error)
            ranks.fail_together(trouble)
        work.attempt += 1
    return trouble


@dataclass
class _Rehearsal:
    """What every process does with the cell, at the size of this attempt."""

    operative: str  # what took effect when the cell was planned
    ranks: int  # processes that the launcher will give to the cell
    attempt: int = 0
    attempts: int = 1

    def __call__(self, cell: Cell, folder: Path, record: RunRecord) -> None:
        experiment = built(cell, folder, record)
        _check_text(self.operative, gin_setup.operative_text())
        parts = experiment.batch_size // group_of(experiment.objective)  # which are not cut
        _check_ranks(experiment.engine, experiment.batch_size, parts, self.ranks)
        if not self.attempt:
            rehearsal.check_ends(experiment)
        sizes = rehearsal.sizes(experiment)
        self.attempts = len(sizes)
        texts = texts_of(cell.arm, (folder / CONFIG).read_text())
        again = partial(built, cell, folder, record)
        result = rehearsal.rehearse(experiment, again, texts, record, folder, *sizes[self.attempt])
        result_table(frame({cell.name: [result]}))


def _check_text(planned: str, again: str) -> None:
    """ValueError if the text of the cell, read back, does not bind what was planned."""
    was, now = gin_setup.bindings_of(planned), gin_setup.bindings_of(again)
    if differing := gin_setup.differing_keys(was, now):
        shown = "; ".join(
            f"{k} = {was.get(k, 'unset')}, read back {now.get(k, 'unset')}" for k in differing[:5]
        )
        raise ValueError(f"gin cannot write what is bound: {shown}. Give values of another form")


def _check_ranks(engine: Engine, batch_size: int, whole: int, processes: int) -> None:
    """ValueError if the processes of the launcher cannot share the batch, of `whole` groups."""
    if processes == 1:
        return
    if not runs_in_several_processes(engine):
        raise ValueError(
            f"run.engine = @{engines.name_of(engine)}() runs in one process, and Grid.launcher "
            f"gives each cell {processes}; include 'trainer/zero2.gin' or bind run.engine = "
            "@zero_engine()"
        )
    parts = processes * getattr(engine, "gradient_accumulation_steps", 1)
    if whole % parts:
        raise ValueError(
            f"run.batch_size = {batch_size} cannot be shared out equally to {processes} processes "
            f"with this accumulation; it must be a multiple of {parts * (batch_size // whole)}"
        )


def _in_place_of(recorder: Recorder) -> Recorder:
    """The recorder itself, but record.jsonl alone where that is copied to an MLflow store.

    A store is for others to read, so that a rehearsal must leave nothing in it. It takes every
    record that the file takes, and a run goes on without it.
    """
    return Jsonl() if isinstance(recorder, Mlflow) else recorder


@contextmanager
def _place(out: Path) -> Iterator[Path]:
    """A folder in `out` for the time of the block; folders made for it are removed, too."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=out))
    try:
        with alone(folder / _TAKING, "a rehearsal"):
            (folder / _TAKING).rename(folder / _LIVE)  # under this name it is locked from the start
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in made:
            with suppress(OSError):  # something else was put there meanwhile
                empty.rmdir()


def remove_leftovers(out: Path) -> None:
    """Delete what killed rehearsals have left in `out`, and nothing of one that is going on."""
    for left in out.glob(f"{PREFIX}*"):
        if _is_dead(left):
            log.info("removing %s, which a process that ended early has left", left)
            shutil.rmtree(left, ignore_errors=True)


def _is_dead(folder: Path) -> bool:
    """Whether no process rehearses there: each holds a lock in its folder.

    Folders of an earlier version have none. They are dead when they are older than any rehearsal.
    """
    if not (folder / _LIVE).exists():
        return time.time() - folder.stat().st_mtime > _LONGEST
    try:
        with alone(folder / _LIVE, "a rehearsal"):
            return True
    except ValueError:  # it is held, or the file system gives no locks
        return False
