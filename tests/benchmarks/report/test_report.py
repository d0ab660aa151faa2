"""The report of recorded runs: what counts, what may stand side by side, and that numbers agree."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from report_runs import ROWS, cell, comparison, outputs, prepared, table, unfinished, values

from benchmarks.records.jsonl import read_record
from benchmarks.report import write_report
from benchmarks.report.intervals import interval
from benchmarks.report.reading.kept_samples import kept_samples
from benchmarks.report.reading.origins import origins_of
from benchmarks.report.reading.recorded_runs import read_runs
from benchmarks.report.rendering.data_frame import report_frame, to_csv
from benchmarks.report.rendering.html import to_page
from benchmarks.report.rendering.markdown import remark, to_markdown
from benchmarks.report.rendering.sample_viewer import viewer_of
from benchmarks.report.rendering.styles import styles_of
from benchmarks.report.tables import build_report


@pytest.fixture(scope="module")
def two_rows(tmp_path_factory) -> Path:
    return comparison(tmp_path_factory.mktemp("runs") / "two", ROWS)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A report over everything that can become of a cell."""
    runs = comparison(tmp_path_factory.mktemp("all") / "runs", ROWS)
    unfinished(runs, "dumo", RuntimeError("the loss is not finite"))
    unfinished(runs, "decm", pruned="at step 7: weak")
    unfinished(runs, "shortcut")
    prepared(runs, "later")
    out = runs.parent / "report"
    write_report([runs], out)
    return out


def test_winner_is_marked_only_where_the_paired_interval_excludes_zero(two_rows):
    found = table(two_rows)
    one, two = found["NFE 1"]["mean_flow"], found["NFE 2"]["mean_flow"]
    assert one.difference == interval([-10.0, -9.5, -10.5])
    assert (one.verdict, one.best) == ("better", True)
    assert (two.verdict, two.best) == ("", False)
    baseline = found["NFE 1"]["flow_matching"]
    assert (baseline.difference, baseline.verdict, baseline.best) == (None, "", False)


def test_unpaired_scatter_does_not_hide_a_paired_difference(two_rows):
    """The intervals of the two rows overlap widely; only pairing shows who is ahead."""
    rows = table(two_rows)["NFE 1"]
    assert rows["mean_flow"].value.high > rows["flow_matching"].value.mean


def test_higher_is_better_for_a_metric_with_a_ceiling(tmp_path):
    low, high = ({"nfe1/recall_pixels": r, "recall_pixels_ceiling": 0.9} for r in (0.2, 0.6))
    rows = {"flow_matching": {0: low, 1: low}, "dumo": {0: high, 1: high}}
    found = table(comparison(tmp_path / "runs", rows))["NFE 1"]
    assert (found["dumo"].verdict, found["dumo"].best) == ("better", True)


def test_one_seed_has_no_interval_and_no_winner(tmp_path):
    runs = comparison(tmp_path / "runs", {arm: {0: seeds[0]} for arm, seeds in ROWS.items()})
    found = table(runs)["NFE 1"]["mean_flow"]
    assert (found.value.half, found.verdict, found.best) == (None, "", False)
    said = outputs(build_report(read_runs([runs])))
    assert all("n = 1 have no interval" in said[name] for name in ("page", "markdown"))
    assert "▲" not in said["markdown"].split("## Results")[1]


def test_only_seeds_of_both_rows_are_paired(tmp_path):
    rows = {"flow_matching": ROWS["flow_matching"], "mean_flow": {1: values(190.0, 1.0)}}
    found = table(comparison(tmp_path / "runs", rows))["NFE 1"]["mean_flow"]
    assert (found.difference.mean, found.difference.n, found.verdict) == (-10.0, 1, "")


def test_value_that_is_not_finite_is_shown_and_never_wins(tmp_path):
    bad = {
        seed: {**found, "nfe1/fd_pixels": float("nan")} for seed, found in ROWS["mean_flow"].items()
    }
    found = table(comparison(tmp_path / "runs", {**ROWS, "dumo": bad}))["NFE 1"]
    assert (found["dumo"].verdict, found["dumo"].best) == ("", False)
    assert found["mean_flow"].verdict == "better"
    assert not found["mean_flow"].best  # not shown to beat every row


def test_baseline_is_chosen_by_name(two_rows):
    found = table(two_rows, baseline="mean_flow")["NFE 1"]
    assert found["flow_matching"].verdict == "worse"
    with pytest.raises(
        ValueError, match="'shortcut', and no row or arm has this name. The rows are flow"
    ):
        table(two_rows, baseline="shortcut")


def test_every_number_of_the_table_equals_the_records(written):
    records = {
        (r.tags["arm"], r.params["run.seed"]): r
        for r in map(
            read_record,
            sorted(
                p
                for p in (written.parent / "runs").iterdir()
                if p.is_dir()
                if (p / "result.json").exists()
            ),
        )
    }
    lines = list(csv.DictReader((written / "table.csv").open()))
    checked = 0
    for line in lines:
        if line["row"] == "real data" or not line["values_by_seed"]:
            continue
        by_seed = dict(pair.split(":") for pair in line["values_by_seed"].split())
        recorded = {
            seed: r.metrics[line["metric"]].last
            for (arm, seed), r in records.items()
            if arm == line["row"]
        }
        assert {seed: float(v) for seed, v in by_seed.items()} == recorded
        wanted = interval(list(recorded.values()))
        assert [float(line[k]) for k in ("n", "mean", "low", "high")] == pytest.approx(
            [wanted.n, wanted.mean, wanted.low, wanted.high], rel=1e-15
        )
        checked += 1
    assert checked == 4  # two rows at two NFE


def test_data_frame_and_csv_hold_the_same_numbers(written):
    report = build_report(read_runs([written.parent / "runs"]))
    found = report_frame(report)
    assert found["mean"].dtype == found["difference"].dtype == "float64"
    read = pd.read_csv(written / "table.csv")
    assert list(read.columns) == list(found.columns)
    for name in read.columns:
        assert read[name].fillna("").tolist() == found[name].fillna("").tolist(), name


CSV = """\
section,row,metric,n,mean,low,high,baseline,difference,difference_low,difference_high,difference_n,\
verdict,best,flag,values_by_seed
,"mean_flow ""a"", b",nfe1/fd_pixels,1,1e-07,,,,,,,,,,,3:1e-07
,real data,nfe1/fd_pixels,1,0.5,,,,,,,,,,,
,"mean_flow ""a"", b",nfe2/fd_pixels,1,nan,,,,,,,,,,,3:nan
,real data,nfe2/fd_pixels,1,0.5,,,,,,,,,,,
,"mean_flow ""a"", b",cost/seconds_per_step,1,0.4,,,,,,,,,,,
,"mean_flow ""a"", b",cost/seconds,1,2.0,,,,,,,,,,,
,"mean_flow ""a"", b",cost/steps,1,20.0,,,,,,,,,,,
,"mean_flow ""a"", b",cost/images,1,160.0,,,,,,,,,,,
"""


def test_csv_is_quoted_and_tells_a_missing_value_from_one_that_is_not_a_number(tmp_path):
    runs = comparison(tmp_path / "runs", {})
    tags = {"group": 'mean_flow "a", b'}
    cell(runs, "mean_flow", 3, values(1e-7, float("nan")), tags=tags)
    assert to_csv(build_report(read_runs([runs]))) == CSV


def test_page_markdown_and_csv_show_the_same_numbers(written):
    page, text = (written / "report.html").read_text(), (written / "report.md").read_text()
    for line in csv.DictReader((written / "table.csv").open()):
        mean = float(line["mean"])
        shown = f"{mean:.4g}"
        assert shown in text, line
        assert shown in page, line
        if line["values_by_seed"]:
            assert f'title="{mean} ±' in page  # every digit, under the pointer


def test_cells_without_a_result_are_listed_with_their_reason_and_counted_nowhere(written):
    text = (written / "report.md").read_text()
    listed = text.split("## Cells without a result")[1].split("## ")[0]
    found = {
        m[0].strip(): (m[1].strip(), m[2].strip())
        for m in re.findall(r"\| (\w+ *)\|([^|]*)\|([^|]*)\|", listed)
    }
    assert found["dumo"] == ("failed", "RuntimeError: the loss is not finite")
    assert found["decm"] == ("pruned", "at step 7: weak")
    assert found["shortcut"][0] == "half-done"
    assert found["later"][0] == "not started"
    assert {line["row"] for line in csv.DictReader((written / "table.csv").open())} == {
        "flow_matching",
        "mean_flow",
        "real data",
    }
    assert "the loss is not finite" in (written / "report.html").read_text()


def test_what_a_record_says_is_shown_as_text_in_every_format(tmp_path):
    evil = "=cmd <img src=x onerror=alert(1)> [a](javascript:b) `c` | d\n# e"
    more = {"group": evil, "cell.command": f"objective-zoo `{evil}` </script>", "guidance": evil}
    runs = comparison(tmp_path / "runs", {})
    cell(runs, "mean_flow", 0, values(1.0, 1.0), tags=more)
    report = build_report(read_runs([runs]))
    said = outputs(report)
    assert "<img" not in said["page"].replace("&lt;img", "")
    outside = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", said["markdown"])
    assert "<img" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert "\n# e" not in said["markdown"]
    lines = csv.DictReader(said["csv"].splitlines(keepends=True))
    assert {line["row"] for line in lines} == {f"'{evil}", "real data"}
    assert set(report_frame(report)["row"]) == {
        evil,
        "real data",
    }  # in Python it is what was recorded


def test_differences_show_only_what_differs(written):
    text = (written / "report.md").read_text()
    differing = text.split("### gin bindings that differ")[1].split("## ")[0]
    assert "mean_flow.path" in differing
    assert "cosine.warmup_steps" not in differing
    shared = text.split("## Provenance")[1].split("### ")[0]
    for fact in (
        "data",
        "features",
        "resize",
        "rounding",
        "samples",
        "guidance",
        "commit",
        "seeds",
    ):
        assert f"\n| {fact} " in shared


def test_overhead_is_over_flow_matching_seed_by_seed(two_rows):
    cost = build_report(read_runs([two_rows])).compared[0].costs
    assert cost["flow_matching"].overhead is None
    assert cost["mean_flow"].overhead == interval([1.0, 1.0, 1.0])
    assert cost["mean_flow"].values["cost/seconds_per_step"] == interval([0.1, 0.2, 0.1 + 0.1 * 2])


def test_what_evaluate_found_is_in_the_report(tmp_path):
    runs = comparison(tmp_path / "runs", ROWS)
    report = build_report(read_runs([runs]))
    assert "Evaluated" not in outputs(report)["markdown"]
    values = {"nfe1/fid": 3.4312, "nfe2/fid": 2.93, "fid_floor": 0.5, "nfe1/recall": 0.61}
    about = {"values": values, "samples": 50_000, "features": {"I": {"reference": "ref.npz"}}}
    where = runs / "mean_flow-1" / "evaluation_ema_width_0.12" / "evaluation.json"
    where.parent.mkdir()
    where.write_text(json.dumps(about))
    found = outputs(build_report(read_runs([runs])))
    line = "| mean_flow | 1 | evaluation_ema_width_0.12 | 50,000 | fid | 3.431 | 2.93 | 0.5 |"
    assert line in re.sub(" +", " ", found["markdown"])
    cells = re.sub(r"</t[hd]>\s*<t[hd][^>]*>", " | ", found["page"])
    assert "50,000 | fid | 3.431 | 2.93 | 0.5 | ref.npz" in cells
    assert "50,000 | recall | 0.61 | - | - | ref.npz" in cells
    where.write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be read.*evaluate again"):
        build_report(read_runs([runs]))


def test_what_is_rendered_was_read_before(tmp_path):
    """Page, Markdown, CSV and viewer need no folder of runs."""
    runs = comparison(tmp_path / "runs", ROWS)
    report = build_report(read_runs([runs]))
    origins, kept = origins_of(report.runs.cells), kept_samples(report.compared[0].section)
    styles = styles_of(report.runs.groups)
    shutil.rmtree(runs)
    page = to_page(report, origins, {0: []}, {0: viewer_of(kept)}, styles)
    assert "data:image/png;base64," in page
    assert to_markdown(report, origins)
    assert to_csv(report)


def test_precision_is_marked_as_higher_is_better_and_sends_the_reader_to_recall(tmp_path):
    high = {f"nfe1/{name}": 0.5 for name in ("precision_pixels", "recall_pixels")}
    low = {name: value - 0.1 for name, value in high.items()}
    ends = {"precision_pixels_ceiling": 0.9, "recall_pixels_ceiling": 0.9}
    rows = {
        arm: {seed: {name: v + 0.001 * seed for name, v in of.items()} | ends for seed in range(4)}
        for arm, of in (("dumo", high), ("flow_matching", low))
    }
    (compared,) = build_report(read_runs([comparison(tmp_path / "runs", rows)])).compared
    table = compared.tables[0]
    assert (table.title, table.better) == ("precision_pixels", "higher")
    assert table.columns[0].entries["dumo"].verdict == "better"
    assert table.columns[0].entries["dumo"].best
    assert ["Recall shows them" in text for t in compared.tables for text in remark(t)] == [True]


def test_declared_direction_of_ones_own_metric_decides_what_is_best(tmp_path):
    rows = {
        arm: {seed: {"nfe1/ours": value + 0.01 * seed} for seed in range(4)}
        for arm, value in (("dumo", 2.0), ("flow_matching", 1.0))
    }
    folder = comparison(tmp_path / "runs", rows)
    for file in folder.glob("*/result.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"better": "higher"}))
    (compared,) = build_report(read_runs([folder])).compared
    assert compared.tables[0].better == "higher"
    assert compared.tables[0].columns[0].entries["dumo"].verdict == "better"
