"""report.html: one file that has its figures, pictures, styles and scripts in it.

plotly's whole script (4.6 MiB) is inlined. It is the bundle that the package ships, so there is no
copy of ours that grows old. A policy in the page's head forbids every request, even by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.report.curves import Figure
from benchmarks.report.reading.evaluations import nfes
from benchmarks.report.reading.origins import Origins
from benchmarks.report.rendering import markdown
from benchmarks.report.rendering.figures import plotly_panel
from benchmarks.report.rendering.sample_viewer import Viewer
from benchmarks.report.rendering.styles import RowStyle
from benchmarks.report.tables import Report

ASSETS = Path(__file__).with_name("assets")


def to_page(
    report: Report,
    origins: Origins,
    figures: Mapping[int, list[Figure]],
    viewers: Mapping[int, Viewer],
    styles: Mapping[str, RowStyle],
) -> str:
    """The page; `figures` and `viewers` by the number of their section."""
    from plotly.offline import get_plotlyjs  # a second to import

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": markdown.number, "plus_minus": markdown.plus_minus}
    return environment.get_template("page.html.j2").render(
        report=report,
        origins=origins,
        figures=figures,
        viewers=viewers,
        styles=styles,
        writing=markdown,
        calls=nfes(report.evaluations),
        arms={group: i for i, group in enumerate(report.runs.groups)},
        data=_json(_data(figures, viewers, styles)),
        style=(ASSETS / "page.css").read_text(),
        script=(ASSETS / "page.js").read_text(),
        plotly=get_plotlyjs(),
    )


def _data(
    figures: Mapping[int, list[Figure]],
    viewers: Mapping[int, Viewer],
    styles: Mapping[str, RowStyle],
) -> dict[str, Any]:
    """What the script draws: panels by the id of their place, and the pictures of earlier steps."""
    panels = {
        f"{figure.name}-{number}-{i}": plotly_panel(panel, styles, legend=i == 0)
        for number, made in figures.items()
        for figure in made
        for i, panel in enumerate(figure.panels)
    }
    strips = {
        f"strip-{number}-{i}": {str(step): uri for step, uri in strip.by_step.items()}
        for number, viewer in viewers.items()
        if len(viewer.steps) > 1
        for i, strip in enumerate(viewer.strips)
    }
    return {"panels": panels, "strips": strips}


def _json(data: Any) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
