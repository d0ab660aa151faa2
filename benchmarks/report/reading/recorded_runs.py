"""Recorded runs as a report sees them: finished cells, and what became of the others.

Everything is read from the folders of the runs: record.jsonl (what MLflow has a copy of), the gin
texts and the kept samples. Nothing is trained, drawn or measured again.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.grids.cell_status import State, state_in
from benchmarks.records.jsonl import RECORD, Record, read_record
from benchmarks.report.reading.run_folders import CELL, folders_of
from benchmarks.runs.result import Result
from registry import gin_setup
from registry.plugins import load_plugins

# Settings that say where and how a run is recorded, continued or stopped, and not what it is.
_ASIDE = ("run.seed", "run.recorder", "run.checkpoint_seconds", "run.pruner", "parameters")
Settings = tuple[tuple[str, str], ...]
_KILLED = "stopped or killed, or still running"


@dataclass(frozen=True, kw_only=True)
class RecordedCell:
    """One finished run; `group` names its row of a table, whose seeds are averaged.

    `alone` says that its grid varies each axis alone, around the arms' own settings.
    """

    record: Record
    result: Result
    group: str
    alone: bool = False

    @property
    def folder(self) -> Path:
        return self.record.folder

    @property
    def seed(self) -> int:
        return self.result.seed

    @property
    def arm(self) -> str:
        return self.record.tags["arm"]

    @property
    def varied(self) -> bool:
        """Whether an axis sets it apart from its arm's own settings, apart from the seed."""
        return self.record.tags.get("group", self.arm) != self.arm

    @property
    def values(self) -> dict[str, float]:
        """The figures at the end, as they were recorded."""
        return {key: self.record.metrics[key].last for key in self.result.values}

    def last(self, metric: str) -> float | None:
        """The last recorded value of any metric."""
        history = self.record.metrics.get(metric)
        return None if history is None else history.last

    @cached_property
    def bindings(self) -> dict[str, str]:
        """The settings that took effect, without the arm's name."""
        params, tags = self.record.params, self.record.tags
        return {
            gin_setup.own_key(key): tags.get(f"changed.{key}", value)
            for key, value in params.items()
            if key not in _ASIDE and not key.startswith(self._aside)
        }

    @cached_property
    def written(self) -> dict[str, str]:
        """The settings as the gin text has them, macros not replaced, by key without scopes."""
        text = gin_setup.bindings_of(self.record.text("operative.gin"))
        return {key.split("/")[-1]: value for key, value in text.items()}

    @cached_property
    def axes(self) -> frozenset[str]:
        """The keys and macros that the grid set for this cell; 'include' stands for whole files."""
        bound = json.loads(self.record.tags.get("cell.bindings", "[]"))
        keys = (binding.split("=")[0].split()[0] for binding in bound)
        return frozenset(gin_setup.own_key(key.split("/")[-1]) for key in keys)

    @property
    def command(self) -> str:
        """The command line that runs the cell again."""
        return command_of(self.record)

    @property
    def _aside(self) -> tuple[str, ...]:
        parts = (self.record.params.get(key, "") for key in ("run.recorder", "run.pruner"))
        return ("mlflow.", *(f"{name}." for part in parts for name in re.findall(r"@(\w+)", part)))


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A cell without a result, which enters no figure."""

    name: str
    group: str
    state: str  # "failed", "pruned", "half-done", "not started", "not here" or "unreadable"
    reason: str
    steps: int
    command: str


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What was found, in the order of the grid or of time; `notes` are for the reader."""

    cells: tuple[RecordedCell, ...]
    unfinished: tuple[Unfinished, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.group for cell in self.cells))

    def of(self, group: str) -> list[RecordedCell]:
        return sorted((c for c in self.cells if c.group == group), key=lambda cell: cell.seed)


def read_runs(runs: Sequence[str | Path], tracking_uri: str = "") -> Runs:
    """The cells in these folders, or of these MLflow runs; ValueError if none of them finished."""
    load_plugins()  # a part knows the former names of its parameters
    found = folders_of(runs, tracking_uri)
    records = {record.id: record for record in map(read_record, found.started)}
    own = {r.folder: (r, state_in(r.folder)) for r in records.values() if "arm" in r.tags}
    groups = {**{folder: _group(record) for folder, (record, _) in own.items()}, **found.groups}
    alone = {folder for folder, mode in found.modes.items() if mode == "one_at_a_time"}
    done = [
        replace(_cell(r, groups[r.folder]), alone=r.folder.resolve() in alone)
        for r, state in own.values()
        if state.status == "finished"
    ]
    others = [
        _unfinished(r, groups[r.folder], state)
        for r, state in own.values()
        if state.status != "finished"
    ]
    others += [_not_started(folder) for folder in found.prepared]
    others += [_not_here(cell) for cell in found.missing]
    if not done:
        listed = "".join(f"\n  {cell.name}: {cell.state} {cell.reason}" for cell in others)
        raise ValueError(
            f"no finished run in {', '.join(map(str, runs))}; give folders of runs, comparisons or "
            f"grids, or MLflow run ids{listed}"
        )
    cells, notes = _without_doubles(_named(done))
    unreadable = [
        f"{r.folder / RECORD}: {r.unreadable} lines that could not be read"
        for r, _ in own.values()
        if r.unreadable
    ]
    pruned = {cell.group for cell in others if cell.state == "pruned"}
    chosen = [
        f"{group}: a seed of it was pruned, so its mean is over a selection"
        for group in dict.fromkeys(cell.group for cell in cells)
        if group in pruned
    ]
    return Runs(
        cells=tuple(cells),
        unfinished=tuple(others),
        notes=(*found.notes, *notes, *chosen, *unreadable),
    )


def command_of(record: Record) -> str:
    words = ["objective-zoo", "run", str(record.folder / "config.gin")]
    return record.tags.get("cell.command") or shlex.join(words)


def _group(record: Record) -> str:
    return record.tags.get("group") or record.tags["arm"]


def _cell(record: Record, group: str) -> RecordedCell:
    return RecordedCell(record=record, result=Result.load(record.folder), group=group)


def _unfinished(record: Record, group: str, state: State) -> Unfinished:
    loss = record.metrics.get("loss")
    return Unfinished(
        name=record.name,
        group=group,
        state=state.status,
        reason=state.note or _KILLED,
        steps=0 if loss is None else int(loss.steps[-1]),
        command=command_of(record),
    )


def _not_started(folder: Path) -> Unfinished:
    name, state, reason, tags = folder.name, "not started", "", {}
    try:
        tags = dict(json.loads((folder / CELL).read_text(encoding="utf-8"))["tags"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        state, reason = "unreadable", f"{folder / CELL} is damaged"
    return Unfinished(
        name=name,
        group=str(tags.get("group", name)),
        state=state,
        reason=reason,
        steps=0,
        command=str(tags.get("cell.command", "")),
    )


def _not_here(cell: Mapping[str, Any]) -> Unfinished:
    return Unfinished(
        name=cell["name"],
        group=cell["group"],
        state="not here",
        reason=f"it was finished in {cell['folder']}, and no such folder is there any more",
        steps=0,
        command=str(cell.get("command", "")),
    )


def _named(cells: Sequence[RecordedCell]) -> list[RecordedCell]:
    """The cells, where rows of one name but different settings get names of their own.

    The name of the folder above the runs is added, and a number where that is not enough.
    """
    named = list(cells)
    kinds = list(dict.fromkeys(map(_settings, cells)))
    for label in (
        lambda cell: cell.folder.resolve().parent.name,
        lambda cell: str(1 + kinds.index(_settings(cell))),
    ):
        variants: dict[str, set[Settings]] = {}
        for cell in named:
            variants.setdefault(cell.group, set()).add(_settings(cell))
        named = [
            replace(cell, group=f"{cell.group} [{label(cell)}]")
            if len(variants[cell.group]) > 1
            else cell
            for cell in named
        ]
    return named


def _settings(cell: RecordedCell) -> Settings:
    return tuple(sorted(cell.bindings.items()))


def _without_doubles(cells: Sequence[RecordedCell]) -> tuple[list[RecordedCell], list[str]]:
    kept: dict[tuple[str, int], RecordedCell] = {}
    notes = []
    for cell in cells:
        first = kept.setdefault((cell.group, cell.seed), cell)
        if first is not cell:
            notes.append(
                f"{cell.folder} is {cell.group} with seed {cell.seed} again; "
                f"{first.folder} is counted"
            )
    return list(kept.values()), notes
