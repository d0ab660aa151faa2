"""One set of curves drawn twice: for the page by plotly, for paper by matplotlib as PNG and PDF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report.curves import Curve, Figure, Panel
from benchmarks.report.rendering.styles import PLOTLY_DASHES, PLOTLY_MARKERS, RowStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3  # panels in a line on paper
_REAL = "#7F7F7F"


def plotly_panel(panel: Panel, styles: Mapping[str, RowStyle], *, legend: bool) -> dict[str, Any]:
    """{"data": traces, "layout": ...} without colours of the page, which its script sets.

    Each trace names its row in `meta`, so that the page can switch one off everywhere.
    """
    floor = panel.lowest / 10 if panel.log_y else -math.inf
    traces = [
        trace
        for curve in panel.curves
        for trace in _traces(curve, styles[curve.group], legend=legend, floor=floor)
    ]
    layout: dict[str, Any] = {
        "title": {"text": panel.title, "font": {"size": 14}, "x": 0.02, "xanchor": "left"},
        "xaxis": {"title": {"text": panel.x_title}, "automargin": True},
        "yaxis": {
            "title": {"text": panel.y_title},
            "type": "log" if panel.log_y else "linear",
            "exponentformat": "power",
            "automargin": True,
        },
        "showlegend": legend,
        "legend": {"orientation": "h", "y": -0.25},
        "hovermode": "closest",
        "margin": {"l": 60, "r": 12, "t": 40, "b": 58},
    }
    if panel.ticks:
        labels = [f"{tick:g}" for tick in panel.ticks]
        layout["xaxis"] |= {"type": "log", "tickvals": panel.ticks, "ticktext": labels}
    if panel.real is not None and (panel.real > 0 or not panel.log_y):
        layout["shapes"] = [
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": panel.real,
                "y1": panel.real, "line": {"dash": "dot", "color": _REAL, "width": 1.5},
                "label": {"text": "real data", "textposition": "end", "font": {"size": 11}},
            }
        ]  # fmt: skip
    return {"data": traces, "layout": layout}


def _traces(curve: Curve, style: RowStyle, *, legend: bool, floor: float) -> list[dict[str, Any]]:
    """The band, cut off at `floor`, and then its line, which is drawn over it."""
    common = {"meta": curve.group, "legendgroup": curve.group, "type": "scatter"}
    line = {
        **common,
        "name": curve.group,
        "x": curve.x,
        "y": [_number(y) for y in curve.y],
        "mode": "lines+markers",
        "showlegend": legend,
        "line": {"color": style.colour, "dash": PLOTLY_DASHES[style.dash], "width": 2},
        "marker": {
            "color": style.colour,
            "symbol": PLOTLY_MARKERS[style.marker],
            "size": 8 if len(curve.x) < 20 else 3,
        },
        "customdata": [
            f"&#177; {half:.4g}, n = {curve.n}" if half else "n = 1" for half in curve.half
        ],
        "hovertemplate": "%{x:.6g}: <b>%{y:.6g}</b> %{customdata}<extra>%{meta}</extra>",
    }
    if not any(curve.half):
        return [line]
    edges = list(zip(curve.y, curve.half, strict=True))
    band = {
        **common,
        "x": [*curve.x, *reversed(curve.x)],
        "y": [_number(y + h) for y, h in edges]
        + [_number(max(y - h, floor)) for y, h in reversed(edges)],
        "fill": "toself",
        "fillcolor": style.band,
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
    }
    return [band, line]


def _number(value: float) -> float | None:
    """None for a value that JSON cannot hold, for which plotly leaves a gap."""
    return value if math.isfinite(value) else None


def save_figure(figure: Figure, styles: Mapping[str, RowStyle], stem: Path) -> list[Path]:
    """The figure as PNG (200 dpi) and PDF, all panels on one sheet of a page's width."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Sheet

    columns = min(_COLUMNS, len(figure.panels))
    lines = -(-len(figure.panels) // columns)
    size = (max(4.5, 2.9 * columns), 2.5 * lines + 0.5)
    with rc_context({"font.size": 8, "axes.titlesize": 8, "pdf.fonttype": 42}):
        sheet = Sheet(figsize=size, dpi=200, layout="constrained")
        for i, panel in enumerate(figure.panels):
            axes = sheet.add_subplot(lines, columns, i + 1)
            _draw(axes, panel, styles)
        handles = {
            str(line.get_label()): line
            for axes in sheet.axes
            for line in axes.get_lines()
            if not str(line.get_label()).startswith("_")
        }
        sheet.legend(
            list(handles.values()), list(handles), loc="outside lower center", frameon=False,
            ncols=max(1, min(len(handles), 2 * columns)),
        )  # fmt: skip
        paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
        sheet.draw_without_rendering()
        sheet.set_layout_engine("none")  # laid out once for both files
        stem.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            sheet.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    return paths


def _draw(axes: Axes, panel: Panel, styles: Mapping[str, RowStyle]) -> None:
    for curve in panel.curves:
        style = styles[curve.group]
        low = [y - h for y, h in zip(curve.y, curve.half, strict=True)]
        high = [y + h for y, h in zip(curve.y, curve.half, strict=True)]
        axes.plot(
            curve.x, curve.y, color=style.colour, linestyle=style.dash, linewidth=1.2,
            marker=style.marker if len(curve.x) < 20 else "", markersize=4, label=curve.group,
        )  # fmt: skip
        if any(curve.half):
            axes.fill_between(curve.x, low, high, color=style.colour, alpha=0.18, linewidth=0)
    if panel.log_y:
        axes.set_yscale("log")
    if panel.ticks:
        axes.set_xscale("log")
        axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axes.set_xticks([], minor=True)
    if panel.real is not None and (panel.real > 0 or not panel.log_y):
        axes.axhline(panel.real, color=_REAL, linestyle=":", linewidth=1.2, label="real data")
    axes.set(title=panel.title, xlabel=panel.x_title, ylabel=panel.y_title)
    axes.spines[["top", "right"]].set_visible(False)
