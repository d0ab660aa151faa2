"""From a gin file to cells that are known to work: each is built, checked and dropped again.

A cell's id is a hash of everything that its figures depend on: the bindings that took effect, with
macros replaced; the version of the package; the identity of the data; the code that its gin files
import. The id does not depend on where and how the cell runs, on what records it, or on how often
it saves.
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

from benchmarks.experiments.arguments import where_to_bind
from benchmarks.experiments.experiment import Experiment
from benchmarks.grids import axes
from benchmarks.grids.axes import Declared, Setting
from benchmarks.grids.cell import Cell, build
from benchmarks.grids.request import PATHS, Request
from benchmarks.launchers.launcher import InProcess
from benchmarks.records.provenance import version_of
from registry import gin_setup, launchers, progress, pruners, recorders
from registry.configuration.gin_errors import message_of
from registry.protocols import Launcher, Recorder
from trainers.zero.engine import WITHOUT_EFFECT

NO_PART_OF_ID = {
    *("run.recorder", "run.pruner", "run.checkpoint_seconds"),
    *(f"zero_engine.{name}" for name in WITHOUT_EFFECT),
}
# Parameters that came later: a grid may be continued that an earlier build of this version began.
LATER = {
    "run.pretrain": "0.0",
    "run.warm_start": "True",
    "decm.velocity": "None",
    "restart.path": "None",
    **dict.fromkeys(("dit.decoder_from", "mlp.decoder_from"), "None"),
    "learned_logvar.weight": "None",
    "plug_in.group": "1",
    **dict.fromkeys(("online.dropout", "ema.dropout", "frozen.dropout"), "'off'"),
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell that can be built, and its texts."""

    cell: Cell
    group: str  # the arm and the values of the axes, without the seed
    values: Setting  # of the axes, without the seed
    bindings: tuple[str, ...]
    config: str
    operative: str
    data: str  # what its data set calls itself
    prunes: bool
    cost: Any  # what `cost_of` returned


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is to run, and how."""

    name: str
    cells: tuple[Planned, ...]
    axes: Declared
    whole: bool  # it has all arms of its file
    notes: tuple[str, ...]  # on axes without effect
    config: str  # of all cells
    launcher: Launcher
    recorder: Recorder


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A cell before equal cells are merged."""

    arm: str
    title: str  # the arm, or else the objective
    setting: Setting
    values: Setting  # the setting without the seed
    group: str
    dropped: tuple[str, ...]  # keys of the setting that nothing used
    unused: frozenset[str]  # everything that nothing used
    id: str
    headline: str
    command: str  # that runs this cell alone
    config: str
    operative: str
    data: str
    recorder: Recorder
    prunes: bool
    cost: Any


def plan(
    request: Request,
    declared: Declared,
    cost_of: Callable[[Experiment], Any] = lambda experiment: None,
) -> Plan:
    """Build every cell, pass it to `cost_of` and drop it again.

    ValueError lists what is wrong with any of them.
    """
    arms = request.arms()
    own = request.own_keys(arms)
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
            drafts.append(_draft(request, arm, setting, cost_of, wrong))
        except Exception as error:
            troubles.setdefault(message_of(error), []).append(axes.label(arm, setting))
            cause = cause or error
    if not troubles and (useless := _useless(own, declared, drafts)):
        troubles[
            f"nothing uses {', '.join(useless)}. A part takes its bindings only where it is bound "
            "by reference, such as mean_flow.weight = @adaptive(); what an arm binds for itself is "
            "changed under its name, such as mean_flow/run.objective = @dumo()"
            f"{where_to_bind(useless)}"
        ] = [""]
    if troubles:
        raise ValueError("\n".join(map(_trouble_line, troubles.values(), troubles))) from cause
    kept = {(draft.arm, draft.id): draft for draft in reversed(drafts)}
    different = [draft for draft in drafts if kept[draft.arm, draft.id] is draft]
    verb = "grid" if declared else "run"
    opened = request.parse()
    command = request.command(verb, request.only, macros=gin_setup.path_macros(PATHS))
    return Plan(
        name=request.name,
        cells=tuple(
            _planned(request.name, declared, draft, f"[{number}/{len(different)}]")
            for number, draft in enumerate(different, 1)
        ),
        axes=declared,
        whole=not request.only,
        notes=tuple(_notes(drafts, len(different))),
        config=request.text(opened, verb, command),
        launcher=gin_setup.build("Grid.launcher") or InProcess(),
        recorder=different[0].recorder,
    )


def _draft(
    request: Request,
    arm: str,
    setting: Setting,
    cost_of: Callable[[Experiment], Any],
    known: Sequence[str],
) -> _Draft:
    """Build one cell; `known` lists what is wrong with the file without this setting."""
    wrong: list[str] = []
    opened = request.parse(axes.bindings(arm, setting), wrong)
    if new := [trouble for trouble in wrong if trouble not in known]:
        raise ValueError("; ".join(new))
    experiment = build(arm)
    data = experiment.dataset.identity()
    identity = _id(gin_setup.imported_files(opened, request.modules), data)
    macros, of_paths = gin_setup.read_macros(), gin_setup.path_macros(PATHS)
    gin_setup.anchor_paths(PATHS)  # what took effect has the paths of the text that the run keeps
    operative = gin_setup.operative_text()
    cost = cost_of(experiment)
    gin_setup.build("Grid.launcher")  # so that its bindings count as used
    inert = set(gin_setup.inert_bindings(arm))
    macros |= gin_setup.read_macros()
    dropped = tuple(key for key, _ in setting if _without_effect(arm, key, inert, macros))
    kept = tuple(pair for pair in setting if pair[0] not in dropped)
    values = tuple(pair for pair in kept if not _is_seed(arm, pair[0]))
    title = arm or experiment.objective_name
    command = request.command("run", [arm] if arm else [], axes.bindings(arm, kept), of_paths)
    return _Draft(
        arm=arm,
        title=title,
        setting=kept,
        values=values,
        group=axes.label(title, values),
        dropped=dropped,
        unused=frozenset(inert | (request.bound_keys & {*gin_setup.overridden_bindings(arm)})),
        id=identity,
        headline=_headline(experiment),
        command=command,
        config=request.text(opened, "run", command, arm),
        operative=operative,
        data=data,
        recorder=experiment.recorder,
        prunes=experiment.pruner is not None,
        cost=cost,
    )


def _planned(grid: str, declared: Declared, draft: _Draft, number: str) -> Planned:
    # By former names, as in `_id`: a grid may be continued whichever name its axes use.
    setting = tuple((gin_setup.former_key(key), value) for key, value in draft.setting)
    readable = axes.slug(axes.label(draft.title, setting))
    name = f"{readable}-{draft.id[:8]}" if declared else draft.title
    bindings = axes.bindings(draft.arm, draft.setting)
    tags = {
        "cell.id": draft.id,
        "arm": draft.title,
        "group": draft.group,
        "grid": grid,
        "cell.bindings": json.dumps(bindings),
        "cell.command": draft.command,
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
        values=draft.values,
        bindings=bindings,
        config=draft.config,
        operative=draft.operative,
        data=draft.data,
        prunes=draft.prunes,
        cost=draft.cost,
    )


def _id(imported: Iterable[Path], data: str) -> str:
    """The id of the cell that was built last, with these Python files of the user's own.

    For a renamed parameter its former name counts, so that a grid can be continued which an earlier
    build of this version began. The package's version is part of the id too: when it is raised,
    every id changes, and `former_key` can be removed here.
    """
    kinds = (recorders, launchers, pruners)
    elsewhere = {name for kind in kinds for name in kind.names()}
    values = {
        gin_setup.former_key(key): value
        for key, value in gin_setup.operative_values().items()
        if (plain := key.split("/")[-1]) not in NO_PART_OF_ID
        and plain.split(".")[0] not in elsewhere
        and LATER.get(plain) != value
    }
    code = [ast.dump(ast.parse(f.read_text())) for f in imported]
    content = [values, version_of("objective-zoo"), data, code]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_effect(arm: str, key: str, inert: set[str], macros: set[str]) -> bool:
    """Whether nothing used this key of a setting; `macros` were read.

    Files are judged by the cell's id alone.
    """
    if key == axes.INCLUDE:
        return False
    if "." not in key:
        return key not in macros
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


def _useless(own: set[str], declared: Declared, drafts: Sequence[_Draft]) -> list[str]:
    """The keys of the request and of its axes that no cell uses."""
    nowhere = own.intersection(*(draft.unused for draft in drafts))
    effective = {key for draft in drafts for key, _ in draft.setting}
    return sorted(nowhere | ({*declared.keys} - effective))


def _trouble_line(names: Sequence[str], trouble: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}: {trouble}" if names[0] else trouble


def _notes(drafts: Sequence[_Draft], different: int) -> list[str]:
    """Which axes have no effect where, and how many different cells are left."""
    without = Counter((key, draft.arm) for draft in drafts for key in draft.dropped)
    notes = [
        f"{key} has no effect in {count} cells{f' of {arm}' if arm else ''}: left out there"
        for (key, arm), count in without.items()
    ]
    if different < len(drafts):
        notes.append(f"of {len(drafts)} cells {different} are different; the others are merged")
    return notes
