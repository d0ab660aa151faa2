"""What a run keeps when it goes on, and a new run that starts from the state of another one.

A run that goes on keeps every setting that its numbers depend on, its data and its code, so that
one line still reproduces the run. What may change is how it is recorded, watched, saved, placed and
shared out to processes. To go on with other settings, or for more steps, is a fork: a new run in
another folder, which begins with the newest checkpoint of its parent. Its folder says so:

    fork.json    the parent's id, folder and step, and the settings that differ
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import registry
from benchmarks.grids.cell import CELL, Cell
from benchmarks.grids.cells import LATER, NO_PART_OF_ID, Planned
from benchmarks.records.jsonl import read_record, read_start
from benchmarks.runs.result import has_result
from registry import gin_setup
from trainers.checkpoints.checkpoint import latest
from trainers.checkpoints.whole_files import read_json, write_json
from trainers.checkpoints.whole_folders import BrokenCheckpoint

FORK, OPERATIVE = "fork.json", "operative.gin"
CHECKPOINTS = "checkpoints"
# Of a fork's state, beside the newest checkpoint: what the steps before it have left.
INHERITED = ("ema_snapshots", "teacher", "pretrain")

# On these no number of a run depends, apart from rounding.
MAY_CHANGE = NO_PART_OF_ID | {
    "run.launcher", "run.log_every", "run.evaluate_every", "run.device",
}  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Where a run began that did not begin at step 0: the content of fork.json."""

    parent: str  # id of the parent's record; '' where it has none
    folder: str
    step: int
    differences: Mapping[str, str]  # "0.001, now 0.05" by setting

    @property
    def tags(self) -> dict[str, str]:
        """As the record of the new run, and its copy in a store, have it."""
        return {
            "fork.parent": self.parent,
            "fork.folder": self.folder,
            "fork.step": str(self.step),
            "fork.differences": json.dumps(self.differences),
        }


def check_same(one: Planned, folder: Path, *, may_change: bool = True) -> None:
    """ValueError if the folder holds a cell of other settings, which must not be overwritten.

    `may_change` allows differences on which no number depends.
    """
    cell = _cell_in(folder)
    if (cell and cell.id == one.cell.id) or not (folder / OPERATIVE).exists():
        return
    found = differences(one, folder)
    kept = {key: change for key, change in found.items() if not (may_change and _harmless(key))}
    done = "finished" if has_result(folder) else "half-done"
    shown = "; ".join(f"{key} = {change}" for key, change in [*kept.items()][:5])
    if not kept and found:
        log.info("%s goes on with %s", folder, ", ".join(sorted(found)))
    elif not kept and cell and may_change and done == "half-done":
        log.warning("%s goes on with other code, or another version of objective-zoo", folder)
    elif kept or cell:
        raise ValueError(
            f"{folder} is {done} with other settings: "
            f"{shown or 'other data, code or version of objective-zoo'}. "
            "Remove it to run it again, or choose another --out; to start a new run from its "
            f"state with other settings, choose another --out and add "
            f"--fork {shlex.quote(str(folder))}"
        )


def differences(one: Planned, folder: Path) -> dict[str, str]:
    """The settings in which a planned cell differs from the one in a folder; and "data", if so."""
    ours, theirs = (
        {
            key.removeprefix(f"{one.cell.arm}/"): value
            for key, value in gin_setup.bindings_of(text).items()
            if not key.split("/")[-1].startswith("mlflow.")
            and LATER.get(key.split("/")[-1]) != value
        }
        for text in (one.operative, (folder / OPERATIVE).read_text(encoding="utf-8"))
    )
    tags = read_record(folder).tags if read_start(folder) else {}
    ours["data"], theirs["data"] = one.data, tags.get("data", one.data)
    return {
        key: f"{theirs.get(key, 'unset')}, now {ours.get(key, 'unset')}"
        for key in gin_setup.differing_keys(ours, theirs)
    }


def state_to_fork(one: Planned, source: Path) -> Path:
    """The newest usable checkpoint of the parent of a new cell; ValueError if there is none.

    `source` is the folder of a run, or of the comparison that has the parent.
    """
    parent = source if (source / CHECKPOINTS).is_dir() else source / one.cell.name
    try:
        newest = latest(parent / CHECKPOINTS)
    except BrokenCheckpoint as problem:
        raise ValueError(f"--fork {source}: {problem}") from problem
    if newest is None:
        raise ValueError(f"--fork {source}: {parent} has no checkpoint to start from")
    return newest


def fork(one: Planned, checkpoint: Path, folder: Path) -> None:
    """Give the new cell in `folder` the state of its parent at a checkpoint, and say so there."""
    parent = checkpoint.parent.parent
    start = read_start(parent)
    about = Fork(
        parent=start["id"] if start else "",
        folder=str(parent.resolve()),
        step=int(checkpoint.name.removeprefix("step_")),
        differences=differences(one, parent) if (parent / OPERATIVE).exists() else {},
    )
    shutil.copytree(checkpoint, folder / CHECKPOINTS / checkpoint.name, dirs_exist_ok=True)
    for name in INHERITED:
        if (parent / name).is_dir():
            shutil.copytree(parent / name, folder / name, dirs_exist_ok=True)
    write_json(folder / FORK, asdict(about))
    log.info("%s starts at step %d of %s", one.cell.name, about.step, parent)


def as_forked(one: Planned, folder: Path) -> Planned:
    """The cell as it is called in its folder: a fork is another run than one from step 0."""
    if not (folder / FORK).exists():
        return one
    try:
        about = Fork(**read_json(folder / FORK))
    except TypeError as problem:
        raise ValueError(f"{folder / FORK} cannot be read: it describes no fork") from problem
    identity = json.dumps([one.cell.id, about.parent, about.folder, about.step])
    id = hashlib.sha256(identity.encode()).hexdigest()
    command = f"{one.cell.tags['cell.command']} --fork {shlex.quote(about.folder)}"
    tags = {**one.cell.tags, **about.tags, "cell.id": id, "cell.command": command}
    note = f"# Forked from {about.folder} at step {about.step}: the file alone starts at step 0.\n"
    return replace(one, cell=replace(one.cell, id=id, tags=tags), config=note + one.config)


def _harmless(key: str) -> bool:
    """Whether no number depends on a setting: one of MAY_CHANGE, or of a recorder and the like."""
    plain = key.split("/")[-1]
    kinds = (registry.recorders, registry.launchers, registry.pruners)
    return plain in MAY_CHANGE or any(plain.split(".")[0] in kind for kind in kinds)


def _cell_in(folder: Path) -> Cell | None:
    """The cell of a folder; None, and a warning, if its file cannot be read."""
    if not (folder / CELL).exists():
        return None
    try:
        return Cell.load(folder)
    except ValueError as problem:
        log.warning("%s. It is written anew", problem)
        return None
