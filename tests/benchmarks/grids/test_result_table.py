"""The table of a comparison: one set of means, as a data frame and as text."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.grids.result_table import result_table, wide
from benchmarks.runs.frame import frame
from benchmarks.runs.result import Result

VALUES = {
    "nfe1/fid": 40.0,
    "nfe1/precision_pixels": 0.5,
    "nfe1/recall_pixels": 0.25,
    "nfe4/fid": 12345678.9,
    "nfe4/precision_pixels": 0.75,
    "nfe4/recall_pixels": 1.0,
    "fid_floor": 3.0,
    "precision_pixels_ceiling": 0.9,
    "recall_pixels_ceiling": 0.8,
    "velocity_error": 0.125,
}
RUN = Result(
    name="decm",
    objective="decm",
    backbone="dit",
    sampler="restart",
    seed=0,
    values=VALUES,
    num_params=1000,
    steps=20,
    images=1280,
    seconds=3.0,
    teacher_steps=10,
    teacher_seconds=1.0,
)


def lacking(run: Result, *keys: str) -> Result:
    return replace(run, values={key: v for key, v in run.values.items() if key not in keys})


ROWS = {
    "decm rate=0.5": [RUN, replace(RUN, seed=1, values=VALUES | {"nfe1/fid": 50.0}, steps=23)],
    "mean_flow": [
        replace(
            lacking(RUN, "nfe4/fid", "nfe4/recall_pixels", "velocity_error"),
            name="mean_flow",
            teacher_steps=0,
            teacher_seconds=0.0,
        )
    ],
}
TABLE = """\
fid by number of network evaluations (NFE), lower is better; real data score 3; means over n runs:

| arm           | sampler | NFE 1 |     NFE 4 | s/step |           steps | images | seconds | \
parameters | n |
|---------------|--------:|------:|----------:|-------:|----------------:|-------:|--------:|\
-----------:|--:|
| decm rate=0.5 | restart |    45 | 1.235e+07 | 0.1667 | 22 (10 teacher) |  1,280 |       3 | \
     1,000 | 2 |
| mean_flow     | restart |    40 |         - | 0.1500 |              20 |  1,280 |       3 | \
     1,000 | 1 |

precision / recall, higher is better; real data score 0.90 / 0.80:

| arm           |       NFE 1 |       NFE 4 |
|---------------|------------:|------------:|
| decm rate=0.5 | 0.50 / 0.25 | 0.75 / 1.00 |
| mean_flow     | 0.50 / 0.25 |    0.75 / - |

error against the exact flow, relative to the data's scale:

| arm           | velocity_error |
|---------------|---------------:|
| decm rate=0.5 |          0.125 |
| mean_flow     |              - |"""


def test_text_is_the_table_of_the_means():
    assert result_table(frame(ROWS)) == TABLE


def titled(values: dict[str, float], **more) -> str:
    return result_table(frame({"decm": [replace(RUN, values=values, **more)]})).split(":")[0]


def test_title_has_the_direction_of_the_first_metric():
    high = {"nfe1/precision_pixels": 0.5, "precision_pixels_ceiling": 0.9}
    assert "higher is better; real data score 0.9" in titled(high)
    assert "lower" not in titled(high)
    assert "lower is better" in titled({"nfe1/fid": 3.0, "fid_floor": 1.0})
    own = {"nfe1/ours": 3.0}
    assert "higher is better" in titled(own, better="higher")
    assert "lower is better" in titled(own, better="lower")
    assert "is better" not in titled(own)  # nothing says so


def test_direction_of_a_declared_metric_leaves_floors_and_errors_alone():
    made = replace(RUN, values=VALUES, better="higher")
    assert made.better_of("fid") == made.better_of("velocity_error") == "lower"
    assert made.better_of("precision_pixels") == made.better_of("ours") == "higher"


def test_text_of_single_runs_counts_no_runs():
    text = result_table(frame({"decm": [RUN]}))
    assert "means over" not in text
    assert "| n |" not in text


def test_data_frame_holds_the_means_by_metric_and_nfe():
    found = wide(frame(ROWS))
    assert list(found.index) == list(ROWS)
    first = found.loc["decm rate=0.5"]
    assert (first["fid", 1], first["fid", 4], first["fid", "real"]) == (45.0, 12345678.9, 3.0)
    assert first["precision_pixels", "real"] == 0.9
    assert (first["velocity_error", ""], first["seeds", ""]) == (0.125, 2)
    assert (first["cost", "steps"], first["cost", "images"]) == (22, 1280)
    assert first["cost", "seconds_per_step"] == 2.0 / 12
    assert list(found["fid"].columns) == [1, 4, "real"]
    assert found["fid"].dtypes.unique().tolist() == ["float64"]


def test_value_that_a_run_of_the_row_lacks_has_no_mean():
    found = wide(frame({"decm": [RUN, lacking(RUN, "nfe1/fid")], "whole": [RUN]}))["fid"]
    assert pd.isna(found.loc["decm", 1])
    assert found.loc["decm", 4] == VALUES["nfe4/fid"]


def test_no_runs_give_an_empty_data_frame():
    assert wide(frame({})).shape == (0, 0)


def test_value_that_is_not_a_number_is_shown_and_is_no_dash():
    diverged = replace(RUN, values=VALUES | {"velocity_error": float("nan")})
    rows = {"decm": [diverged], "mean_flow": [lacking(RUN, "velocity_error")]}
    *_, one, two = result_table(frame(rows)).splitlines()
    assert (one.split()[3], two.split()[3]) == ("nan", "-")


def test_long_frame_has_a_line_for_each_number_of_each_run():
    found = frame(ROWS)
    assert list(found.columns) == [
        "row", "run", "objective", "sampler", "seed", "metric", "nfe", "value", "better",
    ]  # fmt: skip
    costs = found["metric"].str.startswith("cost/")
    assert len(found[~costs]) == sum(len(r.values) for runs in ROWS.values() for r in runs)
    fid = found[(found.metric == "fid") & (found.nfe == 1)]
    assert fid.groupby("row")["value"].apply(list).to_dict() == {
        "decm rate=0.5": [40.0, 50.0],
        "mean_flow": [40.0],
    }
    assert found[found.metric == "fid_floor"]["nfe"].isna().all()


def test_name_that_only_begins_like_an_nfe_stays_whole():
    (metric,) = frame({"a": [replace(RUN, values={"nfe_error": 1.0})]})["metric"][:1]
    assert metric == "nfe_error"


@pytest.mark.parametrize("name", ["parameters", "seconds", "teacher_steps"])
def test_cost_is_that_of_the_result(name):
    found = wide(frame({"decm": [RUN]}))["cost"][name].item()
    assert found == getattr(RUN, {"parameters": "num_params"}.get(name, name))


def test_steps_of_flow_matching_before_the_objective_are_shown_and_left_out_of_the_rate():
    run = replace(RUN, teacher_steps=0, teacher_seconds=0.0, pretrain_steps=4, pretrain_seconds=0.6)
    assert "20 (4 pretrain)" in result_table(frame({"mean_flow": [run]}))
    rate = wide(frame({"mean_flow": [run]}))["cost"]["seconds_per_step"].item()
    assert rate == pytest.approx(run.seconds_per_step) == pytest.approx((3.0 - 0.6) / 16)


def test_a_run_of_which_nothing_was_measured_has_its_costs_in_the_table() -> None:
    text = result_table(frame({"decm": [replace(RUN, values={})]}))
    assert "no distance" in text
    assert f"{RUN.images:,}" in text
