"""Quality against evaluations, time and images, and the course of training, as curves with bands.

A point is the mean over the seeds of a row at a step that all of them recorded, the band its 95 %
interval (intervals.py). Long curves are thinned to points that were recorded, not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.records.jsonl import History
from benchmarks.report.intervals import interval
from benchmarks.report.reading.recorded_runs import RecordedCell
from benchmarks.report.tables import Compared, Table

MAX_POINTS = 200
TRAINING = ("loss", "grad_norm", "terms/", "diagnostics/")
_END = 2**62  # stands for the last step, which may be another one in each seed
_WIDE = 20.0  # positive values that span this factor are shown on a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One row's points; `half` is the band's half width, 0 for one seed."""

    group: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    half: tuple[float, ...]
    n: int


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes; `real` is a line at what real data score."""

    title: str
    x_title: str
    y_title: str
    curves: tuple[Curve, ...]
    real: float | None = None
    ticks: tuple[float, ...] = ()  # of x, where they are few and spaced by factors

    @property
    def lowest(self) -> float:
        return min(self._values, default=0.0)

    @property
    def log_y(self) -> bool:
        return self.lowest > 0 and max(self._values) / self.lowest > _WIDE

    @property
    def _values(self) -> list[float]:
        return [y for curve in self.curves for y in curve.y if math.isfinite(y)]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that belong together, under a name that is also their file's."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]


def figures_of(compared: Compared) -> list[Figure]:
    """The figures of a section, without those for which nothing was recorded."""
    made = [_against_nfe(compared), *_over_training(compared), _course(compared)]
    return [figure for figure in made if figure.panels]


def _against_nfe(compared: Compared) -> Figure:
    panels = [
        Panel(
            title=table.title,
            x_title="network evaluations (NFE)",
            y_title=f"{table.better} is better" if table.better else "",
            curves=tuple(_nfe_curve(table, group) for group in compared.section.groups),
            real=table.columns[0].real.mean if table.columns[0].real else None,
            ticks=tuple(float(_nfe(column.key)) for column in table.columns),
        )
        for table in compared.tables
        if table.columns[0].key.startswith("nfe")
    ]
    return Figure(
        name="quality_nfe",
        title="Quality against network evaluations",
        caption="Mean over seeds and 95 % interval; the dotted line is what real data score.",
        panels=tuple(panels),
    )


def _nfe(key: str) -> int:
    return int(key[3:].split("/")[0])


def _nfe_curve(table: Table, group: str) -> Curve:
    points = [(_nfe(c.key), c.entries[group].value) for c in table.columns if group in c.entries]
    return Curve(
        group=group,
        x=tuple(float(n) for n, _ in points),
        y=tuple(value.mean for _, value in points),
        half=tuple(value.half or 0.0 for _, value in points),
        n=max((value.n for _, value in points), default=0),
    )


def _over_training(compared: Compared) -> list[Figure]:
    """The first metric at each NFE, and the exact errors, against training time and images."""
    keys = [column.key for column in compared.tables[0].columns]
    keys += [c.key for t in compared.tables[1:] for c in t.columns if "/" not in c.key]
    better = {
        c.key: f"{t.better} is better" for t in compared.tables for c in t.columns if t.better
    }
    real = {c.key: c.real.mean for t in compared.tables for c in t.columns if c.real}
    made = []
    for unit, title in (("seconds", "training seconds"), ("images", "images seen")):
        panels = []
        for key in keys:
            curves = _curves(compared, _against, key, unit)
            name = f"{key.split('/')[1]} at NFE {_nfe(key)}" if "/" in key else key
            if curves:
                panels.append(
                    Panel(
                        title=name,
                        x_title=title,
                        y_title=better.get(key, ""),
                        curves=curves,
                        real=real.get(key),
                    )
                )
        made.append(
            Figure(
                name=f"quality_{unit}",
                title=f"Quality against {title}",
                caption=f"At each evaluation during training and at the end; {title} include "
                "those of a teacher or of flow matching before it, and exclude evaluation.",
                panels=tuple(panels),
            )
        )
    return made


def _against(cell: RecordedCell, key: str, unit: str) -> dict[int, tuple[float, float]]:
    """By step, the metric and how much of `unit` had been spent by then, a first phase included."""
    spent, metric = cell.record.metrics.get(unit), cell.record.metrics.get(key)
    if spent is None or metric is None:
        return {}
    before = sum(cell.last(f"{first}/{unit}") or 0.0 for first in ("teacher", "pretrain"))
    known = dict(zip(spent.steps.tolist(), spent.values.tolist(), strict=True))
    end = int(metric.steps[-1])
    return {
        _END if step == end else step: (before + known[step], value)
        for step, value in zip(metric.steps.tolist(), metric.values.tolist(), strict=True)
        if step in known
    }


def _course(compared: Compared) -> Figure:
    names = dict.fromkeys(n for c in compared.section.cells for n in c.record.metrics)
    panels = []
    for name in sorted((n for n in names if n.startswith(TRAINING)), key=_training_order):
        curves = _curves(compared, _by_step, name)
        if curves:
            panels.append(Panel(title=name, x_title="step", y_title="", curves=curves))
    return Figure(
        name="training",
        title="The course of training",
        caption="The loss as it is weighted, the raw error terms, diagnostics, and the gradient's "
        "norm before clipping; means over the steps between two records.",
        panels=tuple(panels),
    )


def _training_order(name: str) -> tuple[int, str]:
    return next(i for i, start in enumerate(TRAINING) if name.startswith(start)), name


def _by_step(cell: RecordedCell, name: str) -> dict[int, tuple[float, float]]:
    history: History | None = cell.record.metrics.get(name)
    if history is None:
        return {}
    points = zip(history.steps.tolist(), history.values.tolist(), strict=True)
    return {step: (float(step), value) for step, value in points}


def _curves(
    compared: Compared, points: Callable[..., dict[int, tuple[float, float]]], *of: str
) -> tuple[Curve, ...]:
    """A curve for each row, from `points(cell, *of)`."""
    made = []
    for group in compared.section.groups:
        by_cell = [points(cell, *of) for cell in compared.section.of(group)]
        steps = _thinned(sorted(set.intersection(*(set(p) for p in by_cell))))
        if not steps:
            continue
        values = [interval([p[step][1] for p in by_cell]) for step in steps]
        made.append(
            Curve(
                group=group,
                x=tuple(float(np.mean([p[step][0] for p in by_cell])) for step in steps),
                y=tuple(value.mean for value in values),
                half=tuple(value.half or 0.0 for value in values),
                n=len(by_cell),
            )
        )
    return tuple(made)


def _thinned(steps: Sequence[int]) -> list[int]:
    """At most MAX_POINTS of them, evenly, the first and the last included."""
    if len(steps) <= MAX_POINTS:
        return list(steps)
    places = np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int)
    return [steps[i] for i in dict.fromkeys(places.tolist())]
