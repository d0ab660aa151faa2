"""The pages of the methods say what the code and the records say today."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import registry
from benchmarks.conformance.report import ConformanceReport, claims_for
from benchmarks.conformance.results import ClaimResult
from benchmarks.method_pages import FOLDER, MEASURED
from benchmarks.pages.index import index_page, methods
from benchmarks.pages.measured import KeptRuns, Measured
from benchmarks.pages.page import _escaped, costs_of, in_gin, method_page
from benchmarks.runs.result import Result
from benchmarks.speed.table import StepCost

HERE = Path(__file__).parents[3] / FOLDER
STALE = "run `make method-pages`, and add CHECK=1 where claims or objectives have changed"


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured.load(HERE / MEASURED)


@pytest.mark.parametrize("name", methods())
def test_page_of_a_method_is_what_the_command_writes(name, measured):
    assert (HERE / f"{name}.md").read_text() == method_page(name, measured), STALE
    assert {r.claim for r in measured.checked[name].results} == set(claims_for(name)), STALE
    assert not [r.claim for r in measured.checked[name].results if r.status == "FAIL"]


def test_index_lists_every_method_and_no_page_is_left_over(measured):
    assert (HERE / "README.md").read_text() == index_page(measured), STALE
    assert {file.stem for file in HERE.glob("*.md")} == {*methods(), "README"}


def test_what_was_measured_is_read_as_it_was_written(tmp_path, measured):
    measured.save(tmp_path / "again.json")
    assert Measured.load(tmp_path / "again.json") == measured
    assert Measured.load(tmp_path / "none.json") == Measured()
    (tmp_path / "bad.json").write_text('{"checked": 3}')
    with pytest.raises(ValueError, match=r"bad\.json is not what .* wrote"):
        Measured.load(tmp_path / "bad.json")


def test_page_tells_a_claim_that_fails():
    failed = ClaimResult(status="FAIL", claim="few rows", reason="the loss of 1 row\nis a | nan")
    measured = Measured().with_report(ConformanceReport("dumo", (failed,)))
    page = method_page("dumo", measured)
    assert "it fails in: few rows." in page
    assert r"the loss of 1 row is a \| nan" in page, "a bar would end the cell of the table"
    assert "was not run for this page" in method_page("dumo", Measured())


def test_page_shows_the_rows_of_its_method_beside_flow_matching():
    rows = {name: [_result(name, value)] for name, value in (("flow_matching", 3.0), ("dumo", 2.0))}
    rows["decm"] = [_result("decm", 1.0)]
    made = {"commit": "0" * 40, "version.objective-zoo": "1", "version.torch": "2", "platform": "X"}
    compared = KeptRuns(
        file="experiments/x.gin", command="run x", made=made, rows=rows, passes={"dumo": 5.0}
    )
    page = method_page("dumo", Measured(compared={compared.file: compared}))
    lines = [
        line.split("|")[1:3] for line in page.splitlines() if "flow_map" in line and "|" in line
    ]
    assert [first.strip() for first, _ in lines] == ["flow_matching", "dumo"]
    assert "a step takes 5 (`dumo`) forward passes" in page


def test_settings_are_shown_as_gin_writes_them():
    from zoo.objectives import DuMo
    from zoo.residuals import Rcgm

    assert in_gin(Rcgm()) == "@rcgm()"
    assert in_gin(Rcgm(order=3)) == "@rcgm(order=3)"
    assert in_gin((0.0, 1.0)) == "(0.0, 1.0)"
    page = method_page("dumo", Measured())
    for field in dataclasses.fields(DuMo):
        assert f"`dumo.{field.name}`" in page


def test_formulas_stay_as_they_are_in_markdown():
    assert _escaped("x_t and _u_ `a*b` [b *d] r < t") == r"x_t and \_u\_ `a*b` [b \*d] r \< t"
    page = method_page("mean_flow", Measured())
    assert "\n    u(x_t, t, r) = v(x_t, t) - (t - r) d/dt u(x_t, t, r)\n" in page


def test_cost_is_that_of_the_objective_whose_name_the_arm_begins_with():
    costs = [_cost(case) for case in ("mean_flow/one_pass", "decm_scratch/one_pass", "decm", "x")]
    assert [cost.case for cost in costs_of("decm", costs)] == ["decm_scratch/one_pass", "decm"]
    assert [cost.case for cost in costs_of("mean_flow", costs)] == ["mean_flow/one_pass"]


def test_registered_methods_are_those_of_the_project():
    assert set(methods()) <= set(registry.objectives.names())
    files = {file.stem for file in (Path(__file__).parents[3] / "zoo/objectives").glob("[!_]*.py")}
    assert set(methods()) == files
    assert all(re.fullmatch(r"[a-z_]+", name) for name in methods())


def _result(name: str, value: float) -> Result:
    return Result(
        name=name,
        objective=name,
        backbone="mlp",
        sampler="flow_map",
        seed=0,
        values={"nfe1/mmd": value},
        num_params=1,
        steps=2,
        images=3,
        seconds=4.0,
    )


def _cost(case: str) -> StepCost:
    return StepCost(
        case=case,
        group="dit/fp32",
        seconds=1.0,
        ratio=1.0,
        passes=3.0,
        theory=1.0,
        images_per_second=1.0,
        outside=0.0,
    )
