"""Curves of recorded points, the figures made of them, and the sample viewer."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_runs import comparison, keep, values
from safetensors.torch import load_file, save_file

from benchmarks.data.pictures import to_uint8
from benchmarks.records.jsonl import RecordWriter, read_record
from benchmarks.report.curves import MAX_POINTS, Curve, Figure, Panel, figures_of
from benchmarks.report.intervals import interval
from benchmarks.report.reading.kept_samples import MAX_STEPS, kept_samples
from benchmarks.report.reading.recorded_runs import read_runs
from benchmarks.report.rendering.figures import plotly_panel, save_figure
from benchmarks.report.rendering.sample_viewer import GAP, NUM_COLUMNS, viewer_of
from benchmarks.report.rendering.styles import COLOURS, styles_of
from benchmarks.report.tables import build_report

ROWS = {
    "flow_matching": {0: values(100.0, 50.0), 1: values(200.0, 60.0)},
    "mean_flow": {0: values(90.0, 55.0), 1: values(190.5, 50.0)},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return comparison(tmp_path_factory.mktemp("runs") / "two", ROWS)


def figure(folder: Path, name: str) -> Figure:
    compared = build_report(read_runs([folder])).compared[0]
    return next(f for f in figures_of(compared) if f.name == name)


def test_quality_over_evaluations_is_the_tables_mean_and_interval(runs):
    panel = figure(runs, "quality_nfe").panels[0]
    curve = next(c for c in panel.curves if c.group == "mean_flow")
    at_one, at_two = interval([90.0, 190.5]), interval([55.0, 50.0])
    assert (curve.x, curve.y, curve.n) == ((1.0, 2.0), (at_one.mean, at_two.mean), 2)
    assert curve.half == (at_one.half, at_two.half)
    assert panel.real == 0.5


def test_quality_over_time_and_images_takes_what_was_spent_at_each_evaluation(runs):
    for unit, at in (("seconds", (1.0, 2.0)), ("images", (80.0, 160.0))):
        panel = figure(runs, f"quality_{unit}").panels[0]
        curve = next(c for c in panel.curves if c.group == "flow_matching")
        assert curve.x == at
        assert curve.y == (300.0, 150.0)  # twice the end at the first evaluation


def test_teachers_time_comes_before_the_students(tmp_path):
    folder = comparison(tmp_path / "runs", {"decm": {0: values(1.0, 1.0)}})
    writer = RecordWriter(folder / "decm-0")
    writer.append("metrics", step=5, time=0, values={"teacher/seconds": 7.0})
    writer.close()
    assert figure(folder, "quality_seconds").panels[0].curves[0].x == (8.0, 9.0)


def test_budget_in_seconds_ends_at_another_step_in_each_seed_and_the_ends_are_averaged(tmp_path):
    folder = comparison(tmp_path / "runs", {"dumo": {0: values(4.0, 1.0), 1: values(6.0, 1.0)}})
    writer = RecordWriter(folder / "dumo-1")
    later = {"nfe1/fd_pixels": 8.0, "seconds": 4.0}
    writer.append("metrics", step=23, time=0, values=later)
    writer.close()
    curve = figure(folder, "quality_seconds").panels[0].curves[0]
    assert (curve.x, curve.y) == ((1.0, 3.0), (10.0, 6.0))


def test_course_of_training_shows_loss_gradient_and_raw_terms(runs):
    panels = {panel.title: panel for panel in figure(runs, "training").panels}
    assert list(panels) == ["loss", "grad_norm", "terms/u"]
    assert panels["loss"].curves[0].x == (5.0, 10.0, 20.0)
    assert panels["loss"].curves[0].y == (1 / 5, 1 / 10, 1 / 20)


def test_long_curve_is_thinned_to_points_that_were_recorded(tmp_path):
    folder = comparison(tmp_path / "runs", {"dumo": {0: values(1.0, 1.0)}})
    writer = RecordWriter(folder / "dumo-0")
    for step in range(21, 1000):
        writer.append("metrics", step=step, time=0, values={"loss": step / 7})
    writer.close()
    curve = figure(folder, "training").panels[0].curves[0]
    recorded = read_record(folder / "dumo-0").metrics["loss"]
    known = dict(zip(recorded.steps.tolist(), recorded.values.tolist(), strict=True))
    assert len(curve.x) == MAX_POINTS
    assert (curve.x[0], curve.x[-1]) == (5.0, 999.0)
    assert all(known[int(x)] == y for x, y in zip(curve.x, curve.y, strict=True))


def test_figure_of_the_page_is_valid_for_plotly_and_names_the_row_of_each_trace(runs):
    from plotly import graph_objects

    for name in ("quality_nfe", "quality_seconds", "training"):
        for panel in figure(runs, name).panels:
            made = plotly_panel(panel, styles_of(list(ROWS)), legend=True)
            graph_objects.Figure(made)  # raises for any property that plotly does not know
            assert {trace["meta"] for trace in made["data"]} == set(ROWS)


def test_band_of_a_logarithmic_axis_stays_above_zero():
    curve = Curve(group="a", x=(1.0, 2.0), y=(1.0, 100.0), half=(5.0, 5.0), n=2)
    panel = Panel(title="loss", x_title="step", y_title="", curves=(curve,))
    band = plotly_panel(panel, styles_of(["a"]), legend=False)["data"][0]
    assert panel.log_y
    assert min(band["y"]) == 0.1


def test_looks_tell_rows_apart_without_colour():
    styles = styles_of([str(i) for i in range(2 * len(COLOURS))])
    assert len(set(styles.values())) == len(styles)
    without = [(style.marker, style.dash) for style in styles.values()][: len(COLOURS)]
    assert len(set(without)) == len(without)


def test_paper_figures_are_written_as_png_and_pdf(runs, tmp_path):
    paths = save_figure(figure(runs, "quality_nfe"), styles_of(list(ROWS)), tmp_path / "f" / "nfe")
    assert [path.name for path in paths] == ["nfe.png", "nfe.pdf"]
    with Image.open(paths[0]) as picture:
        assert picture.width >= 900  # 4.5 inches at 200 dpi
    assert paths[1].read_bytes().startswith(b"%PDF")


def opened(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))


def viewer(folder: Path):
    return viewer_of(kept_samples(build_report(read_runs([folder])).compared[0].section))


def test_viewer_shows_the_kept_pixels_of_one_seed_in_every_row(runs):
    shown = viewer(runs)
    assert (shown.seed, shown.groups, shown.nfes) == (0, ("flow_matching", "mean_flow"), (1, 2))
    assert shown.labels == tuple(range(NUM_COLUMNS))
    strip = next(s for s in shown.strips if (s.group, s.nfe) == ("mean_flow", 2))
    final = load_file(runs / "mean_flow-0" / "samples.safetensors")["nfe2"]
    picture = opened(strip.final)
    for column in range(NUM_COLUMNS):
        start = column * (40 + GAP)
        tile = picture[::5, start : start + 40 : 5, 0]  # 8 pixels, enlarged by 5
        assert np.array_equal(tile, to_uint8(final[column, 0]).numpy())
    assert set(strip.by_step) == {10, 20}
    assert (opened(strip.by_step[10])[:, :40, :3] == 128).all()


def test_viewer_puts_nearest_training_pictures_beside_samples(runs):
    shown = viewer(runs)
    strip = next(s for s in shown.strips if s.nfe == 2)
    assert strip.distances == (2.0,) * NUM_COLUMNS
    assert (opened(strip.nearest)[:, :40, :3] == 128).all()
    assert shown.real_distance == 2.0  # the median of 1, 2, 3
    assert strip.as_sharp == 0.5


def test_viewer_keeps_few_checkpoints_with_the_first_and_the_end(tmp_path):
    folder = comparison(tmp_path / "runs", {"dumo": {0: values(1.0, 1.0)}})
    kept = load_file(folder / "dumo-0" / "samples" / "step_00000010.safetensors")
    for step in range(1, 40):
        save_file(kept, folder / "dumo-0" / "samples" / f"step_{step:08d}.safetensors")
    steps = viewer(folder).steps
    assert (len(steps), steps[0]) == (MAX_STEPS, 1)


def test_viewer_draws_points_over_real_ones(tmp_path):
    folder = comparison(tmp_path / "runs", {"dumo": {0: values(1.0, 1.0)}}, points=True)
    shown = viewer(folder)
    assert shown.points
    assert shown.strips[0].nearest == ""
    colours = {tuple(c) for c in opened(shown.strips[0].final).reshape(-1, 4).tolist()}
    assert len(colours) == 3  # nothing, real points, samples


def test_viewer_leaves_out_what_is_no_picture(tmp_path):
    folder = comparison(tmp_path / "runs", {"dumo": {0: values(1.0, 1.0)}})
    save_file({"nfe1": torch.randn(4, 4, 8, 8)}, folder / "dumo-0" / "samples.safetensors")
    assert viewer(folder) is None
    (folder / "dumo-0" / "samples.safetensors").unlink()
    assert viewer(folder) is None


def test_same_records_are_drawn_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    keep(tmp_path / "one", points=False)
    (tmp_path / "two").mkdir()
    keep(tmp_path / "two", points=False)
    one, two = (load_file(tmp_path / n / "samples.safetensors")["nfe1"] for n in ("one", "two"))
    assert torch.equal(one, two)
