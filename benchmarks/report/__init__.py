"""`objective-zoo report RUN... --out DIR`: recorded runs as a page, Markdown, CSV and figures.

reading/                what was recorded, and which rows may stand side by side
intervals.py tables.py  means, intervals and paired differences; every number is worked out here
curves.py               the same numbers against evaluations, time and training
rendering/              report.html, report.md, table.csv, the figures and the sample viewer
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.curves import figures_of
from benchmarks.report.reading.kept_samples import kept_samples
from benchmarks.report.reading.origins import origins_of
from benchmarks.report.reading.recorded_runs import read_runs
from benchmarks.report.rendering.data_frame import to_csv
from benchmarks.report.rendering.figures import save_figure
from benchmarks.report.rendering.html import to_page
from benchmarks.report.rendering.markdown import to_markdown
from benchmarks.report.rendering.sample_viewer import viewer_of
from benchmarks.report.rendering.styles import styles_of
from benchmarks.report.tables import Report, build_report


def write_report(
    runs: Sequence[str | Path],
    out: Path,
    *,
    baseline: str = "",
    force: bool = False,
    tracking_uri: str = "",
) -> Report:
    """Write report.html, report.md, table.csv and the figures into `out`.

    ValueError for runs that are not there, of which none finished, or that cannot be compared.
    """
    report = build_report(read_runs(runs, tracking_uri), baseline=baseline, force=force)
    origins = origins_of(report.runs.cells)
    styles = styles_of(report.runs.groups)
    figures = {i: figures_of(compared) for i, compared in enumerate(report.compared)}
    shown = {i: viewer_of(kept_samples(c.section)) for i, c in enumerate(report.compared)}
    viewers = {i: viewer for i, viewer in shown.items() if viewer is not None}

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(
        to_page(report, origins, figures, viewers, styles), encoding="utf-8"
    )
    (out / "report.md").write_text(to_markdown(report, origins), encoding="utf-8")
    (out / "table.csv").write_text(to_csv(report), encoding="utf-8")
    for number, made in figures.items():
        for figure in made:
            suffix = f"_{number + 1}" if len(figures) > 1 else ""
            save_figure(figure, styles, out / "figures" / f"{figure.name}{suffix}")
    return report
