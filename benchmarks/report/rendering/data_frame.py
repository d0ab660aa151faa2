"""Every number of a report in one data frame, which table.csv and notebooks share."""

from __future__ import annotations

import pandas as pd

from benchmarks.report.intervals import Interval
from benchmarks.report.tables import Compared, Report

COLUMNS = (
    *("section", "row", "metric", "n", "mean", "low", "high"),
    *("baseline", "difference", "difference_low", "difference_high", "difference_n"),
    *("verdict", "best", "flag", "values_by_seed"),
)

Line = dict[str, object]
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # how a spreadsheet's formula may begin


def report_frame(report: Report) -> pd.DataFrame:
    """One line for each metric or cost of a row, with its interval, difference and seeds.

    `values_by_seed` has every digit of the values, as "seed:value" with spaces between them.
    """
    return _frame(report).infer_objects()


def to_csv(report: Report) -> str:
    """The frame as text. What is missing is empty, and a value that is not a number is nan.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    text = _frame(report).map(_written)
    written: str = text.to_csv(index=False, lineterminator="\n", na_rep="nan")
    return written


def _written(value: object) -> object:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA) else value
    return "" if value is None else value


def _frame(report: Report) -> pd.DataFrame:
    """The frame as objects: None is missing, which a column of floats could not tell from nan."""
    lines = [line for compared in report.compared for line in _lines(compared)]
    return pd.DataFrame(
        [[line.get(name) for name in COLUMNS] for line in lines], columns=COLUMNS, dtype=object
    )


def _lines(compared: Compared) -> list[Line]:
    section = compared.section
    lines: list[Line] = []

    def add(row: str, metric: str, value: Interval, **more: object) -> None:
        lines.append(
            {"section": section.title, "row": row, "metric": metric, **_numbers(value), **more}
        )

    for column in (column for table in compared.tables for column in table.columns):
        for group, entry in column.entries.items():
            add(
                group,
                column.key,
                entry.value,
                **(
                    _difference(compared.baselines[group], entry.difference)
                    if entry.difference
                    else {}
                ),
                verdict=entry.verdict,
                best="best" if entry.best else "",
                flag=section.flags.get(group, ""),
                values_by_seed=" ".join(f"{s}:{value!r}" for s, value in entry.by_seed.items()),
            )
        if column.real:
            add("real data", column.key, column.real)
    for group, cost in compared.costs.items():
        for name, value in {**cost.values, f"time over {compared.against}": cost.overhead}.items():
            if value is not None:
                add(group, name, value)
    return lines


def _numbers(value: Interval) -> Line:
    return {"n": value.n, "mean": value.mean, "low": value.low, "high": value.high}


def _difference(baseline: str, value: Interval) -> Line:
    return {
        "baseline": baseline,
        "difference": value.mean,
        "difference_low": value.low,
        "difference_high": value.high,
        "difference_n": value.n,
    }
