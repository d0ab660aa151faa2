"""Numbers as text, and a report as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from benchmarks.markdown import markdown
from benchmarks.report.intervals import Interval
from benchmarks.report.reading.evaluations import EvaluationLine, nfes
from benchmarks.report.reading.origins import Origins
from benchmarks.report.tables import COSTS, Compared, Entry, Report, RowCost, Table

MARKS = {"better": "▲", "worse": "▼", "best": "★"}
LEGEND = (
    "Mean over n seeds ± half of the 95 % interval (Student t); Δ is the difference to the "
    "baseline, paired by seed. ▲ better and ▼ worse than the baseline where that interval excludes "
    "zero; ★ better than every other row in this sense. Intervals are not corrected for the number "
    "of comparisons."
)
EVALUATED = (
    "These values were measured by objective-zoo evaluate after training, on other numbers of "
    "samples and other references than those above, so they have no intervals and are not "
    "compared. Real halves are what one half of the reference scores against the other."
)
PRECISION = (
    "Blurred samples and averages of pictures lie near the data, and have a high precision. Recall "
    "shows them: read the two side by side."
)
SINGLE = "Rows with n = 1 have no interval, and nothing is marked for them."


def plain(text: str) -> str:
    """A text from a record as a line of Markdown that shows it as it is, without HTML and links."""
    line = re.sub(r"\s+", " ", html.escape(text, quote=False))
    return re.sub(r"([\\`|\[\]])", r"\\\1", line)


def code(text: str) -> str:
    """A text from a record as code in a cell of a table."""
    line = re.sub(r"\s+", " ", text).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def number(value: float) -> str:
    """Four significant digits, whole numbers from ten thousand on."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def plus_minus(value: Interval | None) -> str:
    if value is None:
        return "-"
    if value.half is None:
        return number(value.mean)
    half = f"{value.half:.2g}" if value.half < 100 else f"{value.half:,.0f}"
    return f"{number(value.mean)} ± {half}"


def difference(entry: Entry) -> str:
    """'Δ -12.3 ± 4 ▲', or nothing for the baseline itself."""
    if entry.difference is None:
        return ""
    sign = "+" if entry.difference.mean > 0 else ""
    return f"Δ {sign}{plus_minus(entry.difference)} {MARKS.get(entry.verdict, '')}".strip()


def title(compared: Compared) -> str:
    return compared.section.title or "Results"


def heading(table: Table) -> str:
    return f"{table.title} ({table.better} is better)" if table.better else table.title


def remark(table: Table) -> list[str]:
    """What a reader must know to read the table, as paragraphs."""
    return [PRECISION] if table.title.startswith("precision_") else []


def seeds(table: Table, group: str) -> str:
    """How many seeds a row has in the columns of a table."""
    entries = (column.entries.get(group) for column in table.columns)
    return ", ".join(map(str, sorted({entry.value.n for entry in entries if entry}))) or "0"


def single(compared: Compared) -> bool:
    """Whether a row has only one seed."""
    entries = (e for t in compared.tables for c in t.columns for e in c.entries.values())
    return any(entry.value.n < 2 for entry in entries)


def cost_cells(cost: RowCost) -> list[str]:
    """One text for each column of `cost_heads`."""
    values = [cost.values.get(key) for key in COSTS]
    found = [number(v.mean) if v and not v.half else plus_minus(v) for v in values]
    overhead = "1" if cost.overhead is None else plus_minus(cost.overhead)
    return [*found, overhead, f"{cost.parameters:,}", cost.sampler, cost.evaluations]


def cost_heads(compared: Compared) -> list[str]:
    return [*COSTS.values(), f"time / {compared.against}", "parameters", "sampler", "NFE measured"]


def evaluated_heads(lines: Sequence[EvaluationLine]) -> list[str]:
    calls = [f"NFE {nfe}" for nfe in nfes(lines)]
    return ["evaluation", "samples", "metric", *calls, "real halves", "reference"]


def evaluated_cells(line: EvaluationLine, calls: Sequence[int]) -> list[str]:
    values = [*map(line.by_nfe.get, calls), line.real]
    shown = ["-" if value is None else number(value) for value in values]
    return [line.name, f"{line.samples:,}", line.metric, *shown, line.reference]


def to_markdown(report: Report, origins: Origins) -> str:
    """The tables, the costs, what did not finish, and the provenance."""
    parts = ["# Comparison", LEGEND]
    for compared in report.compared:
        parts += _section(compared)
    if lines := report.evaluations:
        rows = [[line.group, str(line.seed), *evaluated_cells(line, nfes(lines))] for line in lines]
        parts += ["## Evaluated", EVALUATED]
        parts += [_table(["row", "seed", *evaluated_heads(lines)], rows)]
    if unfinished := report.runs.unfinished:
        rows = [[c.name, c.state, c.reason or "-", str(c.steps)] for c in unfinished]
        parts += ["## Cells without a result", "None of them enters a number above."]
        parts += [_table(["cell", "state", "reason", "steps"], rows)]
    if report.runs.notes:
        parts += ["## Notes", "\n".join(f"- {plain(note)}" for note in report.runs.notes)]
    groups = list(report.runs.groups)
    parts += [
        "## Provenance",
        _table(["fact", "all rows"], list(map(list, origins.shared.items()))),
    ]
    for title, found in (
        ("What differs", origins.differing),
        ("gin bindings that differ", origins.bindings),
    ):
        rows = [[name, *(values.get(g, "-") for g in groups)] for name, values in found.items()]
        if rows:
            parts += [f"### {title}", _table(["", *groups], rows)]
    cells = [[plain(c.group), str(c.seed), code(c.command)] for c in report.runs.cells]
    parts += ["## One line for each cell", markdown(["row", "seed", "command"], cells)]
    return "\n\n".join(parts) + "\n"


def _section(compared: Compared) -> list[str]:
    section = compared.section
    parts = [f"## {plain(title(compared))}", f"Baseline: {plain(compared.baseline)}."]
    if single(compared):
        parts.append(SINGLE)
    parts += [
        f"**Forced:** {plain(flag)}; nothing is marked for it." for flag in section.flags.values()
    ]
    for table in compared.tables:
        parts += [f"### {plain(heading(table))}", *remark(table), _metric(compared, table)]
    rows = [[_flagged(compared, g), *cost_cells(cost)] for g, cost in compared.costs.items()]
    return [*parts, "### Cost", _table(["row", *cost_heads(compared)], rows)]


def _metric(compared: Compared, table: Table) -> str:
    rows = []
    for group in compared.section.groups:
        entries = [column.entries.get(group) for column in table.columns]
        rows.append([_flagged(compared, group), seeds(table, group), *map(_entry, entries)])
    if any(column.real for column in table.columns):
        real = [column.real for column in table.columns]
        rows.append(["real data", str(max(v.n for v in real if v)), *map(plus_minus, real)])
    return _table(["row", "n", *(column.label for column in table.columns)], rows)


def _entry(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    best = f" {MARKS['best']}" if entry.best else ""
    apart = difference(entry)
    return plus_minus(entry.value) + best + (f" ({apart})" if apart else "")


def _flagged(compared: Compared, group: str) -> str:
    return f"{group} [forced]" if group in compared.section.flags else group


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The cells come from records."""
    return markdown([plain(cell) for cell in header], [[plain(c) for c in row] for row in rows])
