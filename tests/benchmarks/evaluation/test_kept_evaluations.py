"""Evaluations add to those before them, and reach the record and the report."""

from __future__ import annotations

import json
import shutil

import pytest
from evaluation_runs import request

from benchmarks.evaluation.kept_evaluations import identity, joined, kept
from benchmarks.evaluation.protocol import evaluate_run
from benchmarks.evaluation.request import EvaluationRequest
from benchmarks.records.jsonl import read_record
from benchmarks.report.reading.evaluations import evaluation_lines
from benchmarks.report.reading.recorded_runs import read_runs


def test_evaluation_adds_to_the_files_and_to_the_record(run_folder, tmp_path) -> None:
    run, out = tmp_path / "run", tmp_path / "run" / "evaluation"
    shutil.copytree(run_folder, run)

    def evaluated(**changes) -> dict[str, float]:
        wanted = {"num": 64, "nfe": (1,), "features": ("pixels",), "metrics": ("frechet",)}
        cache = tmp_path / "reference"
        return evaluate_run(run, EvaluationRequest(**(wanted | {"cache": cache} | changes)))

    first, more = evaluated(), evaluated(nfe=(2,))
    other = evaluated(seed=1)
    newest, before = kept(out / "evaluation.json")
    assert (newest["seed"], newest["values"]) == (1, other)
    assert (before["seed"], before["values"]) == (0, first | more)
    assert set(before["sampler"]) == {"1", "2"}

    record = read_record(run)
    assert record.status == "FINISHED"
    for one, values in ((newest, other), (before, first | more)):
        told = json.loads(record.tags[f"evaluation.{identity(one)}"])
        assert (told["samples"], told["seed"]) == (64, one["seed"])
        for name, value in values.items():
            assert record.metrics[f"evaluation/{identity(one)}/{name}"].last == value
    assert out / "evaluation.json" in record.artifacts

    page = (out / "evaluation.md").read_text()
    assert page.index(f"{other['nfe1/fd_pixels']:.4g}") < page.index(
        f"{first['nfe1/fd_pixels']:.4g}"
    )
    lines = [line for cell in read_runs([run]).cells for line in evaluation_lines([cell])]
    assert [(line.name, sorted(line.by_nfe)) for line in lines] == [
        ("evaluation; seed 1", [1]),
        ("evaluation; seed 0", [1, 2]),
    ]


def test_evaluations_are_told_apart_by_how_they_were_measured() -> None:
    one = {
        "samples": 8,
        "seed": 0,
        "metrics": ["A()"],
        "sampler": {"1": "x"},
        "values": {"nfe1/a": 1},
    }
    more = one | {"metrics": ["B()"], "sampler": {"2": "x"}, "values": {"nfe2/b": 2}}
    both = joined(more, [one])
    assert both["values"] == {"nfe1/a": 1, "nfe2/b": 2}
    assert (both["metrics"], both["others"]) == (["B()", "A()"], [])
    for name, value in {"samples": 9, "seed": 1, "code": {"commit": "1"}}.items():
        apart = joined(one | {name: value}, [one])
        assert apart["others"] == [one]
        assert identity(apart) != identity(one)


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 1}', "[" * 100_000])
def test_file_that_holds_no_evaluations_is_named_before_anything_is_drawn(
    run_folder, tmp_path, text
) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be read"):
        evaluate_run(run_folder, request(tmp_path), tmp_path)
