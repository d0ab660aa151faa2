"""What rows must share to stand side by side, and what is done where they do not.

A number depends on the data, on what measured it (features with their weights, resize, rounding,
count, reference), on the guidance of the samples, and on the budget and the schedule that was
laid out over it. Rows that differ in one of these facts are refused, with three exceptions. Where
the axes of one grid vary the budget, the rows stand in one table, whose rows say the axis; a row is
compared with rows of its own budget. Where the axes vary another fact, or the arms of one file have
different budgets, such rows get sections of their own, and no difference is taken across sections.
Rows that the user forces into one section are shown with a flag.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.reading.recorded_runs import RecordedCell

UNSTATED = "not recorded"

# The gin keys that decide each fact. Where an axis of a grid binds one of them, or a field of a
# part that they name, the fact is the grid's question.
BOUND_BY = {
    "data": ("run.dataset",),
    "features": ("run.metric", "feature_metrics.extractor"),
    "resize": ("run.metric", "feature_metrics.extractor"),
    "rounding": ("run.metric", "feature_metrics.extractor"),
    "metrics": ("run.metric", "feature_metrics.metrics"),
    "samples": ("run.num_samples",),
    "reference": ("run.dataset", "run.metric", "feature_metrics.extractor", "run.num_samples"),
    "guidance": (
        *("omega", "kappa", "guidance_scale", "guidance_interval"),
        *("cfg.scale", "cfg.interval", "input_guidance.scale", "input_guidance.interval"),
        *("cfg.least_nfe", "run.sampler"),
    ),
    "budget": ("run.steps", "run.images", "run.seconds", "run.batch_size"),
    "schedule": ("run.schedule",),
}
IN_ROWS = ("budget", "schedule")  # the facts that do not split a section where an axis binds them


@dataclass(frozen=True)
class Section:
    """Cells that may stand side by side; `title` says what sets them apart from other sections.

    `flags` says how a group differs from the first one, where the user forced them together.
    `conditions` has what an axis sets for each group of the facts in `IN_ROWS`.
    """

    title: str
    cells: tuple[RecordedCell, ...]
    flags: Mapping[str, str]
    conditions: Mapping[str, tuple[str, ...]]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.group for cell in self.cells))

    def of(self, group: str) -> list[RecordedCell]:
        return [cell for cell in self.cells if cell.group == group]


def facts(cell: RecordedCell) -> dict[str, str]:
    """What the cell's figures depend on besides its method, by name."""
    tags, bound = cell.record.tags, cell.bindings

    def tag(*names: str) -> str:
        return "; ".join(tags[n] for n in names if n in tags) or UNSTATED

    return {
        "data": tag("data"),
        "features": tag("measured.features", "measured.protocol", "measured.weights"),
        "resize": tag("measured.resize"),
        "rounding": tag("measured.rounding"),
        "metrics": tag("measured.metrics"),
        "samples": tag("measured.samples"),
        "reference": tag("measured.reference", "measured.floor"),
        "guidance": tag("guidance"),
        "budget": _budget(bound),
        "schedule": _schedule(bound),
    }


def sections(cells: Sequence[RecordedCell], *, force: bool = False) -> list[Section]:
    """The cells in sections of equal facts; ValueError for a difference that nobody declared."""
    in_rows = [name for name in IN_ROWS if _bound_by_axis(name, cells)]
    split = [name for name in _declared(cells) if name not in in_rows]
    found: dict[tuple[str, ...], list[RecordedCell]] = {}
    for cell in cells:
        known = facts(cell)
        found.setdefault(tuple(known[name] for name in split), []).append(cell)
    made = []
    for key, members in found.items():
        title = "; ".join(f"{n} {v}" for n, v in zip(split, key, strict=True) if n != "reference")
        differing = _differing(members, in_rows)
        if differing and not force:
            raise ValueError(
                "these rows cannot stand side by side:\n  "
                + "\n  ".join(differing.values())
                + "\nReport them apart, or add --force to show them with this flag"
            )
        conditions = {c.group: tuple(facts(c)[name] for name in in_rows) for c in members}
        made.append(Section(title, tuple(members), differing, conditions))
    return made


def _bound_by_axis(fact: str, cells: Sequence[RecordedCell]) -> bool:
    axes = frozenset().union(*(cell.axes for cell in cells))
    return any(_binds(axis, BOUND_BY[fact], cells) for axis in axes)


def _declared(cells: Sequence[RecordedCell]) -> list[str]:
    """The facts that a grid's axes make differ, and the budget where the arms of a file do."""
    grids = {cell.record.parent for cell in cells}
    return [
        name
        for name in BOUND_BY
        if len({facts(cell)[name] for cell in cells if cell.seed == cells[0].seed}) > 1
        if _bound_by_axis(name, cells)
        or (name == "budget" and len(grids) == 1 and None not in grids)
    ]


def _binds(axis: str, keys: Sequence[str], cells: Sequence[RecordedCell]) -> bool:
    """Whether the axis is one of these keys, a field of their parts, or a macro that they read."""
    written = [cell.written for cell in cells]
    parts = {
        name for w in written for key in keys for name in re.findall(r"@(\w+)", w.get(key, ""))
    }
    part, _, name = axis.partition(".")
    if axis == "include" or part in parts or axis in keys or name in keys:
        return True
    read = re.compile(rf"%{re.escape(axis)}\b")
    concerned = (v for w in written for k, v in w.items() if k in keys or k.split(".")[0] in parts)
    return any(map(read.search, concerned))


def _differing(cells: Sequence[RecordedCell], in_rows: Sequence[str]) -> dict[str, str]:
    """How the facts of each group, but for `in_rows`, differ from the first one's, seed by seed."""
    first = cells[0].group
    mine = {cell.seed: facts(cell) for cell in cells if cell.group == first}
    found: dict[str, dict[str, str]] = {}
    for cell in cells:
        theirs = mine.get(cell.seed, facts(cells[0]))
        for name, value in facts(cell).items():
            if name in in_rows:
                continue
            if name == "reference" and cell.seed not in mine:
                continue  # other seeds draw another reference
            if value != theirs[name]:
                found.setdefault(cell.group, {})[name] = f"{name}: {value} (there: {theirs[name]})"
    return {
        group: f"{group} differs from {first} in {'; '.join(named.values())}"
        for group, named in found.items()
    }


def _budget(bound: Mapping[str, str]) -> str:
    for unit in ("steps", "images", "seconds"):
        amount = bound.get(f"run.{unit}", "None")
        if amount != "None":
            return f"{amount} {unit} at batch {bound.get('run.batch_size', UNSTATED)}"
    return UNSTATED


def _schedule(bound: Mapping[str, str]) -> str:
    """The schedule and its settings; it is laid out over the budget."""
    name = re.sub(r"[@()]", "", bound.get("run.schedule", UNSTATED))
    if name == "None":
        name = "cosine"  # the default of run.schedule
    given = [f"{k.split('.')[-1]} = {v}" for k, v in bound.items() if k.startswith(f"{name}.")]
    return f"{name}({', '.join(given)})"
