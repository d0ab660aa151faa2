"""The table of a comparison: as a data frame, and from the same means as aligned Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from benchmarks.markdown import markdown
from benchmarks.runs.frame import COST
from benchmarks.runs.result import REAL_SCORES

NOTHING = "no distance"  # a handful of samples may allow none; then the table has costs alone
REAL, NO_NFE = "real", ""  # the column level nfe: what real data score, and values without an NFE
_FIRST = ("teacher", "pretrain")  # what may have been trained before the objective
# Their means are whole numbers.
_COUNTS = ("steps", "images", "parameters", *(f"{name}_steps" for name in _FIRST))
_QUALITY = ("precision", "recall")

Column = tuple[str, int | str]  # (metric, nfe)
Means = dict[str, dict[Column, Any]]  # by row


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    """One line for each row of a long frame (benchmarks/runs/frame.py), with means over its runs.

    The columns are pairs (metric, nfe): ("fid", 4); ("fid", "real") for what real data score;
    ("velocity_error", "") for a value without NFE; ("cost", "steps") and the other costs;
    ("sampler", "") and ("seeds", "") for the sampler and the number of runs. A mean is missing
    where one of the row's runs lacks the value.
    """
    means = _means(frame)
    columns = _columns(means)
    table = pd.DataFrame(
        {column: [values.get(column) for values in means.values()] for column in columns},
        index=pd.Index(means, name="row"),
    )
    table.columns = pd.MultiIndex.from_tuples(columns, names=["metric", "nfe"])
    return table


def result_table(frame: pd.DataFrame) -> str:
    """The means of `wide` as Markdown: the first metric with what it cost, fidelity, exact errors.

    A value that is missing is a dash, and a value that is not a number is nan.
    """
    means = _means(frame)
    columns = _columns(means)
    measured = [(metric, nfe) for metric, nfe in columns if isinstance(nfe, int)]
    nfes = sorted({nfe for _, nfe in measured})
    first = measured[0][0] if measured else NOTHING
    directions = frame.loc[frame["metric"] == first, "better"]
    parts = _first_metric(means, first, next(iter(directions), ""), nfes)
    at_one = [name for name, nfe in measured if nfe == 1]
    pair = [next((name for name in at_one if name.startswith(f"{p}_")), "") for p in _QUALITY]
    if all(pair):
        parts += _quality(means, pair, nfes)
    if exact := sorted(name for name, nfe in columns if nfe == NO_NFE and "_error" in name):
        lines = [[row, *(_number(of, (n, NO_NFE)) for n in exact)] for row, of in means.items()]
        parts += ["error against the exact flow, relative to the data's scale:"]
        parts += [markdown(["arm", *exact], lines)]
    return "\n\n".join(parts)


def _means(frame: pd.DataFrame) -> Means:
    """By row and column: the mean over the row's runs, without the columns that a run lacks."""
    means: Means = {}
    for row, lines in frame.groupby("row", sort=False):
        runs = int((lines["metric"] == f"{COST}steps").sum())
        of: dict[Column, Any] = {("sampler", NO_NFE): lines["sampler"].iloc[0]}
        of["seeds", NO_NFE] = runs
        for (metric, nfe), same in lines.groupby(["metric", "nfe"], sort=False, dropna=False):
            if len(same) == runs:
                of[_column(metric, nfe)] = fmean(same["value"])
        for name in _COUNTS:
            of["cost", name] = round(of["cost", name])
        of["cost", "seconds_per_step"] = _seconds_per_step(of)
        means[str(row)] = of
    return means


def _columns(means: Means) -> list[Column]:
    return list(dict.fromkeys(column for values in means.values() for column in values))


def _column(metric: str, nfe: Any) -> Column:
    if not pd.isna(nfe):
        return metric, int(nfe)
    if metric.startswith(COST):
        return "cost", metric.removeprefix(COST)
    for ending in REAL_SCORES:
        if metric.endswith(ending):
            return metric.removesuffix(ending), REAL
    return metric, NO_NFE


def _seconds_per_step(of: Mapping[Column, Any]) -> float:
    """The seconds of one step of the objective itself; what was trained first is left out."""
    seconds, steps = (
        of["cost", unit] - sum(of["cost", f"{name}_{unit}"] for name in _FIRST)
        for unit in ("seconds", "steps")
    )
    return float(seconds / steps)


def _cost(of: Mapping[Column, Any]) -> list[str]:
    cost = {name: value for (metric, name), value in of.items() if metric == "cost"}
    first = [(cost[f"{name}_steps"], name) for name in _FIRST]
    inside = "".join(f" ({steps:,} {name})" for steps, name in first if steps)
    return [
        f"{cost['seconds_per_step']:.4f}",
        f"{cost['steps']:,}{inside}",
        f"{cost['images']:,}",
        f"{cost['seconds']:.0f}",
        f"{cost['parameters']:,}",
    ]


def _first_metric(means: Means, metric: str, better: str, nfes: Sequence[int]) -> list[str]:
    """The metric by NFE beside what a row cost, under a title with the first row's real score."""
    title = f"{metric} by number of network evaluations (NFE)"
    if better:
        title += f", {better} is better"
    if (floor := next(iter(means.values())).get((metric, REAL))) is not None:
        title += f"; real data score {floor:.4g}"
    header = ["arm", "sampler", *_heads(nfes), "s/step", "steps", "images", "seconds", "parameters"]
    rows = [
        [row, of["sampler", NO_NFE], *(_number(of, (metric, n)) for n in nfes), *_cost(of)]
        for row, of in means.items()
    ]
    counts = [of["seeds", NO_NFE] for of in means.values()]
    if max(counts) > 1:
        title += "; means over n runs"
        header.append("n")
        rows = [[*row, str(count)] for row, count in zip(rows, counts, strict=True)]
    return [f"{title}:", markdown(header, rows)]


def _quality(means: Means, names: Sequence[str], nfes: Sequence[int]) -> list[str]:
    """Fidelity and diversity by NFE, under a title with the first row's real scores."""
    first = next(iter(means.values()))
    scores = [first[name, REAL] for name in names if (name, REAL) in first]
    real = f"; real data score {' / '.join(f'{v:.2f}' for v in scores)}" if scores else ""

    def pair(of: Mapping[Column, Any], nfe: int) -> str:
        values = [of.get((name, nfe)) for name in names]
        return " / ".join("-" if value is None else f"{value:.2f}" for value in values)

    lines = [[row, *(pair(of, nfe) for nfe in nfes)] for row, of in means.items()]
    title = f"precision / recall, higher is better{real}:"
    return [title, markdown(["arm", *_heads(nfes)], lines)]


def _heads(nfes: Sequence[int]) -> list[str]:
    return [f"NFE {n}" for n in nfes]


def _number(of: Mapping[Column, Any], column: Column) -> str:
    return f"{of[column]:.4g}" if column in of else "-"
