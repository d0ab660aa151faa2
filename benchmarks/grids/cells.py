"""From a gin file to cells that are known to work: all are built and checked, and dropped again.

A cell's id is a hash of everything that its figures depend on: what took effect of its gin text,
with macros replaced; the package's version; the identity of the data; the code that its gin files
import. Where and how it runs, what records it and how often it saves are no part of it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments.experiment import Experiment
from benchmarks.grids import axes
from benchmarks.grids.axes import Declared, Setting
from benchmarks.grids.cell import Cell, build
from benchmarks.grids.request import Request
from benchmarks.launchers.launcher import InProcess, Launcher
from benchmarks.records.provenance import version_of
from registry import gin_setup, launchers, pruners, recorders
from registry.gin_errors import said
from trainers import progress
from trainers.zero.engine import WITHOUT_EFFECT

NO_PART_OF_ID = {
    *("run.recorder", "run.pruner", "run.checkpoint_seconds"),
    *(f"zero_engine.{name}" for name in WITHOUT_EFFECT),
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell that is known to work, and its texts."""

    cell: Cell
    group: str  # the arm with its values, but for the seed
    bindings: tuple[str, ...]
    config: str
    operative: str
    prunes: bool
    cost: Any  # what `look` found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is to run, and how."""

    name: str
    cells: tuple[Planned, ...]
    axes: Declared
    notes: tuple[str, ...]  # on axes without effect
    config: str  # of all cells
    launcher: Launcher
    recorder: Any


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A cell before those that are the same are merged."""

    arm: str
    title: str  # the arm, or else the objective
    setting: Setting
    group: str
    dropped: tuple[str, ...]  # keys of the setting that nothing used
    unused: frozenset[str]  # everything that nothing used
    id: str
    headline: str
    config: str
    operative: str
    recorder: Any
    prunes: bool
    cost: Any


def plan(
    request: Request,
    declared: Declared,
    look: Callable[[Experiment], Any] = lambda experiment: None,
) -> Plan:
    """Build every cell, `look` at it and drop it; ValueError with the troubles of all together."""
    arms = request.arms()
    drafts: list[_Draft] = []
    wrong: list[str] = []
    request.parse(troubles=wrong)
    troubles = {trouble: [""] for trouble in wrong}
    cause = None
    cells = declared.cells(arms)
    # disable=None: not where stderr is no terminal
    shown = progress.bar(
        cells, "building the cells", worth=len(cells) > 8, leave=False, disable=None
    )
    for arm, setting in shown:
        try:
            drafts.append(_draft(request, arm, setting, look, wrong))
        except Exception as error:
            troubles.setdefault(said(error), []).append(axes.label(arm, setting))
            cause = cause or error
    if not troubles and (useless := _useless(request, arms, declared, drafts)):
        troubles[
            f"nothing uses {', '.join(useless)}. A part takes its bindings only where it is bound "
            "by reference, such as mean_flow.weight = @adaptive(); what an arm binds for itself is "
            "changed under its name, such as mean_flow/run.objective = @dumo()"
        ] = [""]
    if troubles:
        raise ValueError("\n".join(map(_told, troubles.values(), troubles))) from cause
    kept = {(draft.arm, draft.id): draft for draft in reversed(drafts)}
    different = [draft for draft in drafts if kept[draft.arm, draft.id] is draft]
    verb = "grid" if declared else "run"
    opened = request.parse()
    return Plan(
        name=gin_setup.resolve(request.file).stem,
        cells=tuple(
            _planned(request, declared, draft, f"[{number}/{len(different)}]")
            for number, draft in enumerate(different, 1)
        ),
        axes=declared,
        notes=tuple(_notes(drafts, len(different))),
        config=request.text(opened, request.command(verb, request.arm)),
        launcher=gin_setup.build("Grid.launcher") or InProcess(),
        recorder=different[0].recorder,
    )


def _draft(
    request: Request,
    arm: str,
    setting: Setting,
    look: Callable[[Experiment], Any],
    known: Sequence[str],
) -> _Draft:
    """Build one cell; `known` is what is wrong with the file anyway."""
    wrong: list[str] = []
    opened = request.parse(axes.bindings(arm, setting), wrong)
    if new := [trouble for trouble in wrong if trouble not in known]:
        raise ValueError("; ".join(new))
    experiment = build(arm)
    operative = gin_setup.operative_text()
    identity = _id(opened, experiment.dataset.identity())
    cost = look(experiment)
    gin_setup.build("Grid.launcher")  # what is bound for it is used
    inert = set(gin_setup.inert_bindings(arm))
    dropped = tuple(key for key, _ in setting if _without_effect(arm, key, inert))
    kept = tuple(pair for pair in setting if pair[0] not in dropped)
    title = arm or experiment.objective_name
    return _Draft(
        arm=arm,
        title=title,
        setting=kept,
        group=axes.label(title, tuple(pair for pair in kept if not _is_seed(arm, pair[0]))),
        dropped=dropped,
        unused=frozenset(inert | (request.asked & {*gin_setup.overridden_bindings(arm)})),
        id=identity,
        headline=_headline(experiment),
        config=request.text(opened, request.command("run", arm, axes.bindings(arm, kept)), arm),
        operative=operative,
        recorder=experiment.recorder,
        prunes=experiment.pruner is not None,
        cost=cost,
    )


def _planned(request: Request, declared: Declared, draft: _Draft, number: str) -> Planned:
    # By former names, as `_id` has them: a grid goes on whichever name its axes use.
    setting = tuple((gin_setup.former_key(key), value) for key, value in draft.setting)
    readable = axes.slug(axes.label(draft.title, setting))
    name = f"{readable}-{draft.id[:8]}" if declared else draft.title
    bindings = axes.bindings(draft.arm, draft.setting)
    tags = {
        "cell.id": draft.id,
        "arm": draft.title,
        "group": draft.group,
        "grid": gin_setup.resolve(request.file).stem,
        "cell.bindings": json.dumps(bindings),
        "cell.command": request.command("run", draft.arm, bindings),
    }
    cell = Cell(
        name=name,
        id=draft.id,
        arm=draft.arm,
        headline=f"{number} {name}: {draft.headline}",
        tags=tags,
    )
    return Planned(
        cell=cell,
        group=draft.group,
        bindings=bindings,
        config=draft.config,
        operative=draft.operative,
        prunes=draft.prunes,
        cost=draft.cost,
    )


def _id(opened: Iterable[Path], data: str) -> str:
    """Of what was just built.

    Where a parameter was renamed, its former name counts, so that a grid which an earlier build of
    this version began goes on. The package's version is part of the id too: when it is raised every
    id changes, and `former_key` can go from here.
    """
    kinds = (recorders, launchers, pruners)
    elsewhere = {name for kind in kinds for name in kind.names()}
    values = {
        gin_setup.former_key(key): value
        for key, value in gin_setup.operative_values().items()
        if (plain := key.split("/")[-1]) not in NO_PART_OF_ID
        and plain.split(".")[0] not in elsewhere
    }
    code = [ast.dump(ast.parse(f.read_text())) for f in gin_setup.imported_files(opened)]
    content = [values, version_of("objective-zoo"), data, code]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_effect(arm: str, key: str, inert: set[str]) -> bool:
    """Whether nothing used this key of a setting. Files are judged by the cell's id alone."""
    if key == axes.INCLUDE:
        return False
    if "." not in key:
        return key not in gin_setup.read_macros()
    return gin_setup.own_key(axes.bound_key(arm, key)) in inert


def _is_seed(arm: str, key: str) -> bool:
    """Whether the key is run.seed, or the macro that run.seed reads."""
    read = gin_setup.scope_bindings("") | (gin_setup.scope_bindings(arm) if arm else {})
    return key.split("/")[-1] == "run.seed" or read.get("run.seed") == f"%{key}"


def _headline(experiment: Experiment) -> str:
    budget = experiment.budget
    return (
        f"{experiment.objective_name} on {experiment.dataset.name} with "
        f"{experiment.backbone_name} ({experiment.num_params:,} parameters), "
        f"{budget.amount:g} {budget.unit} at batch {experiment.batch_size}"
    )


def _useless(
    request: Request, arms: Sequence[str], declared: Declared, drafts: Sequence[_Draft]
) -> list[str]:
    """The keys that no cell uses."""
    nowhere = request.own_keys(arms).intersection(*(draft.unused for draft in drafts))
    effective = {key for draft in drafts for key, _ in draft.setting}
    return sorted(nowhere | ({*declared.keys} - effective))


def _told(names: Sequence[str], trouble: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: {trouble}" if names[0] else trouble


def _notes(drafts: Sequence[_Draft], different: int) -> list[str]:
    """What an axis does not do, and how many cells are left."""
    without = Counter((key, draft.arm) for draft in drafts for key in draft.dropped)
    notes = [
        f"{key} has no effect in {count} cells{f' of {arm}' if arm else ''}: left out there"
        for (key, arm), count in without.items()
    ]
    if different < len(drafts):
        notes.append(f"of {len(drafts)} cells {different} are different; the others are merged")
    return notes
