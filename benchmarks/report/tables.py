"""Every number of a report. Page, Markdown and CSV only show what is worked out here, once.

A table is one metric, its rows are arms (with the values of a grid's axes), its columns numbers of
network evaluations. Each row has a baseline: the user's, else the row of flow matching at the same
budget; where a grid varies each axis alone, the arm's own setting. Against it a row is `better` or
`worse` only where the interval of the paired difference excludes zero. A row is the `best` of a
column only where it is better in this sense than every other row of its budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.intervals import Interval, interval, paired
from benchmarks.report.reading.comparability import Section, sections
from benchmarks.report.reading.evaluations import EvaluationLine, evaluation_lines
from benchmarks.report.reading.recorded_runs import RecordedCell, Runs
from benchmarks.runs.result import REAL_SCORES

BASELINE = "flow_matching"
COSTS = {
    "cost/seconds_per_step": "seconds per step",
    "cost/passes_per_step": "network passes per step",
    "cost/peak_memory_mib": "peak memory (MiB)",
    "cost/seconds": "training seconds",
    "cost/steps": "steps",
    "cost/images": "images seen",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row in one column: its values by seed, and how it compares with the baseline."""

    by_seed: Mapping[int, float]
    value: Interval
    difference: Interval | None  # to the baseline; None for itself and without common seeds
    verdict: str  # "better", "worse" or ""
    best: bool


@dataclass(frozen=True, kw_only=True)
class Column:
    """One recorded metric, such as "nfe1/fd_pixels", by row; `real` is what real data score."""

    key: str
    label: str
    entries: Mapping[str, Entry]
    real: Interval | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """`better` is "lower", "higher", or "" where nothing says so."""

    title: str
    better: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What a row cost. `values` are by recorded name; `overhead` is a ratio of seconds per step.

    The ratio is to the row that the section measures time by, which has none itself.
    """

    values: Mapping[str, Interval]
    overhead: Interval | None
    parameters: int
    sampler: str
    evaluations: str  # network evaluations that were measured


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The tables and costs of a section; `against` is the row whose time per step counts as 1."""

    section: Section
    baselines: Mapping[str, str]  # by row; a baseline may have none
    tables: tuple[Table, ...]
    costs: Mapping[str, RowCost]
    against: str

    @property
    def baseline(self) -> str:
        """The baseline of all rows, or the list of them."""
        return ", ".join(dict.fromkeys(self.baselines.values())) or "none"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was read, and what was worked out for each section of the runs."""

    runs: Runs
    compared: tuple[Compared, ...]
    evaluations: tuple[EvaluationLine, ...]


def build_report(runs: Runs, *, baseline: str = "", force: bool = False) -> Report:
    """The report; ValueError for rows that cannot stand side by side, or an unknown baseline."""
    if baseline and not _row(runs.cells, baseline):
        raise ValueError(
            f"the baseline is {baseline!r}, and no row or arm has this name. The rows are "
            f"{', '.join(runs.groups)}"
        )
    made = [_compared(section, baseline) for section in sections(runs.cells, force=force)]
    lines = evaluation_lines(runs.cells)
    return Report(runs=runs, compared=tuple(made), evaluations=tuple(lines))


def _compared(section: Section, wanted: str) -> Compared:
    groups = section.groups
    baselines = _baselines(section, wanted)
    measured_by = (c.group for c in section.cells if c.result.objective == BASELINE)
    against = next(measured_by, next(iter(baselines.values()), groups[0]))
    return Compared(
        section=section,
        baselines=baselines,
        tables=tuple(_tables(section, baselines)),
        costs={group: _cost(section, group, against) for group in groups},
        against=against,
    )


def _baselines(section: Section, wanted: str) -> dict[str, str]:
    """The row that each row is compared with; see the head of this module."""
    plain = [cell for cell in section.cells if not cell.varied]
    found = {}
    for cell in section.cells:
        same = section.conditions[cell.group]
        peers = [peer for peer in section.cells if section.conditions[peer.group] == same]
        peers.sort(key=lambda peer: peer.varied)  # an arm's own setting before those of an axis
        asked = _row(peers, wanted) or _row(section.cells, wanted)
        own = _row(plain, cell.arm) if cell.alone and cell.varied else ""
        found[cell.group] = asked or own or _row(peers, BASELINE) or peers[0].group
    return found


def _row(cells: Sequence[RecordedCell], name: str) -> str:
    """The row of this name, or else the first row of the arm of this name, or else ""."""
    found = (cell.group for cell in cells if name in (cell.group, cell.record.tags["arm"]))
    return next(found, "")


def _tables(section: Section, baselines: Mapping[str, str]) -> list[Table]:
    """A table for each sampled metric, as recorded, and one of errors against the exact flow."""
    keys = list(dict.fromkeys(key for cell in section.cells for key in cell.result.values))
    sampled = list(dict.fromkeys(k.split("/", 1)[1] for k in keys if k.startswith("nfe")))
    nfes = sorted({int(k[3:].split("/")[0]) for k in keys if k.startswith("nfe")})
    made = []
    for metric in sampled:
        better = next(filter(None, (c.result.better_of(metric) for c in section.cells)), "")
        columns = [(f"nfe{n}/{metric}", f"NFE {n}") for n in nfes if f"nfe{n}/{metric}" in keys]
        real = next((f"{metric}{end}" for end in REAL_SCORES if f"{metric}{end}" in keys), "")
        made.append(_table(section, baselines, metric, better, columns, real))
    exact = [(k, k.replace("_", " ")) for k in keys if "/" not in k and "_error" in k]
    if exact:
        made.append(_table(section, baselines, "error against the exact flow", "lower", exact, ""))
    return made


def _table(
    section: Section,
    baselines: Mapping[str, str],
    title: str,
    better: str,
    columns: Sequence[tuple[str, str]],
    real: str,
) -> Table:
    scores = {cell.seed: cell.values[real] for cell in section.cells if real in cell.values}
    return Table(
        title=title,
        better=better,
        columns=tuple(
            Column(
                key=key,
                label=label,
                entries=_entries(section, key, baselines, better),
                real=interval(list(scores.values())) if scores else None,
            )
            for key, label in columns
        ),
    )


def _entries(
    section: Section, key: str, baselines: Mapping[str, str], better: str
) -> dict[str, Entry]:
    by_seed = {
        group: {c.seed: c.values[key] for c in section.of(group) if key in c.values}
        for group in section.groups
    }
    by_seed = {group: values for group, values in by_seed.items() if values}
    wanted = {"lower": -1, "higher": 1}.get(better, 0)

    def side(ours: str, theirs: str) -> int:
        """1 where ours is better beyond the interval, -1 where it is worse."""
        apart = paired(by_seed[ours], by_seed[theirs])
        flagged = ours in section.flags or theirs in section.flags
        return 0 if apart is None or flagged else apart.sign * wanted

    entries = {}
    for group, values in by_seed.items():
        same = section.conditions[group]
        others = [o for o in by_seed if o != group and section.conditions[o] == same]
        baseline = baselines[group]
        against = baseline in by_seed and group != baseline
        entries[group] = Entry(
            by_seed=values,
            value=interval(list(values.values())),
            difference=paired(values, by_seed[baseline]) if against else None,
            verdict={1: "better", -1: "worse"}.get(side(group, baseline), "") if against else "",
            best=bool(others) and all(side(group, other) == 1 for other in others),
        )
    return entries


def _cost(section: Section, group: str, against: str) -> RowCost:
    cells = section.of(group)
    found = {key: _by_seed(cells, key) for key in COSTS}
    theirs = _by_seed(section.of(against), "cost/seconds_per_step")
    ours = found["cost/seconds_per_step"]
    nfes = sorted({int(k[3:].split("/")[0]) for k in cells[0].values if k.startswith("nfe")})
    return RowCost(
        values={key: interval(list(v.values())) for key, v in found.items() if v},
        overhead=paired(ours, theirs, ratio=True) if group != against else None,
        parameters=cells[0].result.num_params,
        sampler=cells[0].result.sampler,
        evaluations=", ".join(map(str, nfes)),
    )


def _by_seed(cells: Sequence[RecordedCell], metric: str) -> dict[int, float]:
    values = {cell.seed: cell.last(metric) for cell in cells}
    return {seed: value for seed, value in values.items() if value is not None}
