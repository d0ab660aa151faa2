"""Which recorded runs a report counts, and which rows may stand side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import ROWS, cell, comparison, outputs, prepared, unfinished, values

from benchmarks.report.reading.comparability import sections
from benchmarks.report.reading.recorded_runs import read_runs
from benchmarks.report.tables import build_report


@pytest.mark.parametrize("binding", ["STEPS = {}", "dumo/run.steps = {}", "include '{}.gin'"])
def test_axis_over_the_budget_may_be_a_key_a_macro_or_a_file(tmp_path, binding):
    runs = comparison(tmp_path / "runs", {})
    for steps in ("20", "40"):
        more = {"cell.bindings": json.dumps([binding.format(steps)])}
        settings = {"STEPS": steps}
        cell(runs, f"dumo_{steps}", 0, values(1.0, 1.0), tags=more, settings=settings)
    away = comparison(tmp_path / "away", {"mean_flow": {0: values(1.0, 1.0)}})
    (section,) = sections(read_runs([runs]).cells)
    assert len({budget for budget, *_ in section.conditions.values()}) == 2
    more = {"tags": {"measured.samples": "5"}}
    other = comparison(tmp_path / "other", {"shortcut": {0: values(1.0, 1.0)}}, **more)
    if "include" not in binding:  # a file may bind anything
        with pytest.raises(ValueError, match="samples: 5"):
            sections(read_runs([runs, away, other]).cells)


DIFFERENCES = {
    "samples": {"tags": {"measured.samples": "128"}},
    "features": {"tags": {"measured.features": "InceptionV3"}},
    "rounding": {"tags": {"measured.rounding": "floor"}},
    "resize": {"tags": {"measured.resize": "bilinear"}},
    "data": {"tags": {"data": "digits: another hash"}},
    "guidance": {"tags": {"guidance": "scale 2, learned in training"}},
    "budget": {"settings": {"STEPS": "40"}},
    "schedule": {"settings": {"cosine.warmup_steps": "100"}},
    "reference": {"tags": {"measured.reference": "64 rows of another draw"}},
}


def test_nothing_finished_is_told_with_what_there_is(tmp_path):
    runs = comparison(tmp_path / "runs", {})
    unfinished(runs, "dumo", RuntimeError("no luck"))
    with pytest.raises(
        ValueError, match=r"no finished run .*\n  dumo: failed RuntimeError: no luck"
    ):
        read_runs([runs])
    with pytest.raises(ValueError, match="no folder of runs, and no MLflow run id"):
        read_runs([tmp_path / "missing"])


@pytest.mark.parametrize("fact", DIFFERENCES)
def test_rows_of_other_provenance_are_refused_by_name_unless_forced(tmp_path, fact):
    ours = comparison(tmp_path / "ours", {"flow_matching": ROWS["flow_matching"]})
    theirs = comparison(tmp_path / "theirs", {"mean_flow": ROWS["mean_flow"]}, **DIFFERENCES[fact])
    runs = read_runs([ours, theirs])
    with pytest.raises(ValueError, match=rf"mean_flow differs from flow_matching in {fact}: .*"):
        build_report(runs)
    forced = build_report(runs, force=True).compared[0]
    assert list(forced.section.flags) == ["mean_flow"]
    entry = forced.tables[0].columns[0].entries["mean_flow"]
    assert (entry.difference.mean, entry.verdict, entry.best) == (-10.0, "", False)


def test_forced_rows_are_flagged_in_every_output(tmp_path):
    ours = comparison(tmp_path / "ours", {"flow_matching": ROWS["flow_matching"]})
    more = DIFFERENCES["samples"]
    theirs = comparison(tmp_path / "theirs", {"mean_flow": ROWS["mean_flow"]}, **more)
    said = outputs(build_report(read_runs([ours, theirs]), force=True))
    flag = "mean_flow differs from flow_matching in samples: 128 (there: 64)"
    assert [name for name, text in said.items() if flag not in text] == []


def test_axis_over_the_budget_is_read_in_one_table_and_each_budget_has_its_baseline(tmp_path):
    runs = comparison(tmp_path / "runs", {})
    for steps in ("20", "40"):
        for arm, by_seed in reversed(ROWS.items()):
            for seed, found in by_seed.items():
                tags = {
                    "arm": arm,
                    "group": f"{arm} steps={steps} rate=0.5",
                    "cell.bindings": json.dumps([f"{arm}/run.steps = {steps}"]),
                }
                name = f"{arm}_{steps}"
                more = {"tags": tags, "settings": {"run.steps": steps}, "objective": arm}
                cell(runs, name, seed, found, **more)
    report = build_report(read_runs([runs]))
    (compared,) = report.compared
    assert len(compared.section.groups) == 4
    for steps in ("20", "40"):
        rows = {arm: f"{arm} steps={steps} rate=0.5" for arm in ROWS}
        assert {compared.baselines[row] for row in rows.values()} == {rows["flow_matching"]}
    # Where rows of another budget counted, too, only one row of a column could be the best.
    marked = [e for t in compared.tables for c in t.columns for e in c.entries.values() if e.best]
    assert len(marked) == 2 * sum(
        entry.best
        for table in build_report(read_runs([comparison(tmp_path / "one", ROWS)]))
        .compared[0]
        .tables
        for column in table.columns
        for entry in column.entries.values()
    )
    swapped = build_report(read_runs([runs]), baseline="mean_flow").compared[0]
    assert swapped.baselines["flow_matching steps=40 rate=0.5"] == "mean_flow steps=40 rate=0.5"
    one = "mean_flow steps=20 rate=0.5"
    named = build_report(read_runs([runs]), baseline=one).compared[0]
    assert named.baselines["flow_matching steps=20 rate=0.5"] == one
    for text in outputs(report).values():  # a name with a dot is a name
        assert text.count("mean_flow steps=40 rate=0.5") > 1


def test_axis_elsewhere_does_not_excuse_another_budget(tmp_path):
    runs = comparison(tmp_path / "runs", {})
    tags = {"cell.bindings": json.dumps(["mean_flow/adaptive.power = 1.0"])}
    cell(runs, "flow_matching", 0, values(1.0, 1.0), tags=tags)
    cell(runs, "mean_flow", 0, values(1.0, 1.0), tags={**tags, "measured.samples": "5"})
    with pytest.raises(ValueError, match="samples: 5"):
        sections(read_runs([runs]).cells)


def test_same_name_with_other_settings_is_a_row_of_its_own(tmp_path):
    one = comparison(tmp_path / "one", {"mean_flow": ROWS["mean_flow"]})
    more = {"settings": {"adaptive.power": "0.0"}}
    two = comparison(tmp_path / "two", {"mean_flow": ROWS["mean_flow"]}, **more)
    assert read_runs([one, two]).groups == ("mean_flow [one]", "mean_flow [two]")


def test_seeds_from_several_folders_are_one_row_and_a_repeated_seed_counts_once(tmp_path):
    parts = [
        comparison(tmp_path / f"part{i}", {"mean_flow": {seed: ROWS["mean_flow"][seed]}})
        for i, seed in enumerate((0, 1, 2, 1))
    ]
    runs = read_runs([*parts, parts[0]])
    assert [(c.group, c.seed) for c in runs.cells] == [("mean_flow", s) for s in (0, 1, 2)]
    assert len(runs.notes) == 1
    assert "again" in runs.notes[0]


def test_group_with_a_pruned_seed_is_noted(tmp_path):
    runs = comparison(tmp_path / "runs", {"dumo": {0: values(1.0, 1.0)}})
    unfinished(runs, "dumo", pruned="at step 7: weak")
    assert ["a seed of it was pruned" in note for note in read_runs([runs]).notes] == [True]


def test_cell_finished_elsewhere_is_found_through_the_grid(tmp_path):
    away = comparison(tmp_path / "away", {"dumo": {0: values(1.0, 1.0)}}) / "dumo-0"
    here = comparison(tmp_path / "here", {"mean_flow": {0: values(2.0, 2.0)}})
    cells = [
        {"name": "dumo-0", "group": "dumo steps=3", "folder": str(away)},
        {"name": "mean_flow-0", "group": "mean_flow", "folder": "/gone/and/moved"},
        {"name": "lost", "group": "lost", "folder": "/gone/lost"},
    ]
    (here / "grid.json").write_text(json.dumps({"cells": cells}))
    runs = read_runs([here])
    assert runs.groups == ("dumo steps=3", "mean_flow")  # as this grid calls them
    (lost,) = runs.unfinished
    assert (lost.name, lost.state) == ("lost", "not here")
    assert "/gone/lost" in lost.reason
    assert "/gone/lost" in outputs(build_report(runs))["markdown"]


def grid_of(folder: Path, names: list[str], **more) -> Path:
    """The grid.json of a folder, with these of its cells."""
    cells = [{"name": n, "group": n.rsplit("-", 1)[0], "folder": str(folder / n)} for n in names]
    (folder / "grid.json").write_text(json.dumps({"cells": cells, **more}))
    return folder


def test_a_cell_that_the_grid_no_longer_has_is_named_and_not_counted(tmp_path):
    runs = grid_of(comparison(tmp_path / "runs", ROWS), ["mean_flow-1", "mean_flow-2"])
    found = read_runs([runs])
    assert [(c.group, c.seed) for c in found.cells] == [("mean_flow", 1), ("mean_flow", 2)]
    assert sum("is no longer a cell of the grid" in note for note in found.notes) == 4
    asked = read_runs([runs, runs / "mean_flow-0"])
    assert [c.seed for c in asked.of("mean_flow")] == [0, 1, 2]


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"cells": [{}]}', '{"cells": [{"name": "../x", "group": "x"}]}']
)
def test_a_damaged_grid_is_named_and_the_runs_beside_it_count(tmp_path, content):
    runs = comparison(tmp_path / "runs", ROWS)
    (runs / "grid.json").write_text(content)
    found = read_runs([runs])
    assert len(found.cells) == 6
    assert ["grid.json cannot be read" in note for note in found.notes] == [True]


def test_a_damaged_cell_file_is_named_among_the_cells_without_a_result(tmp_path):
    runs = comparison(tmp_path / "runs", ROWS)
    prepared(runs, "later")
    (cell_file,) = (p for p in runs.rglob("cell.json") if not (p.parent / "record.jsonl").exists())
    cell_file.write_text("[" * 100_000)
    (found,) = read_runs([runs]).unfinished
    assert (found.state, str(cell_file) in found.reason) == ("unreadable", True)


def test_where_axes_vary_alone_each_arms_own_setting_is_its_baseline(tmp_path):
    runs = comparison(tmp_path / "runs", {})
    for arm in ("flow_matching", "mean_flow"):
        for row, more in ((arm, {}), (f"{arm} lr=1", {"adamw.lr": "1"})):
            tags = {"arm": arm, "group": row}
            cell(runs, row, 0, values(1.0, 1.0), tags=tags, settings=more, objective=arm)
    names = sorted(path.name for path in runs.iterdir() if path.is_dir())
    (compared,) = build_report(read_runs([grid_of(runs, names, mode="one_at_a_time")])).compared
    assert compared.baselines == {
        "flow_matching": "flow_matching", "flow_matching lr=1": "flow_matching",
        "mean_flow": "flow_matching", "mean_flow lr=1": "mean_flow",
    }  # fmt: skip
    (compared,) = build_report(read_runs([grid_of(runs, names, mode="product")])).compared
    assert compared.baseline == "flow_matching"


def test_mlflow_runs_are_found_by_id(tmp_path, mlflow_store):
    from mlflow import MlflowClient

    runs = comparison(tmp_path / "runs", {"mean_flow": {0: values(2.0, 2.0)}})
    client = MlflowClient(mlflow_store)
    experiment = client.create_experiment("objective-zoo")
    parent = client.create_run(experiment).info.run_id
    tags = {"mlflow.parentRunId": parent, "cell.folder": str(runs / "mean_flow-0")}
    child = client.create_run(experiment, tags=tags).info.run_id
    for run_id in (parent, child):
        assert read_runs([run_id]).groups == ("mean_flow",)
    with pytest.raises(ValueError, match=f"has no run {'0' * 32}"):
        read_runs(["0" * 32])
