"""The Python door: what a notebook would write, and that it is the command line's equal."""

from __future__ import annotations

import doctest
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gin
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo

import objective_zoo as oz
import registry
from benchmarks.conformance.report import CLAIMS
from benchmarks.records.jsonl import read_record
from registry import gin_setup
from trainers.optim import AdamW
from zoo.objectives import FlowMatching
from zoo.times import BetaPair
from zoo.weighting import Adaptive

TINY: dict[str, Any] = {
    "run.steps": 4, "run.batch_size": 8, "run.num_samples": 12, "run.nfe": (1, 2),
    "run.log_every": 1, "run.backbone": "@dit", "dit.patch": 2, "dit.dim": 16, "dit.depth": 1,
    "dit.num_heads": 2, "run.metric": "@feature_metrics()",
    "feature_metrics.extractor": "@pixels()", "run.recorder": "@jsonl()",
}  # fmt: skip
# What is tested of a run that was rehearsed is the `compared` one, whose rehearsal costs as much.
quick_run, quick_grid = (partial(made, rehearsal=False) for made in (oz.run, oz.grid))
GRID = """
include 'experiments/digits.gin'
Grid.arms = ('mean_flow',)
Grid.axes = {'adaptive.power': [0.5, 1.0]}
Grid.repeat = {'run.seed': [0, 1]}
mean_flow.weight = @adaptive()
"""
ARMS = """
include 'experiments/digits.gin'
Grid.arms = ('good', 'bad')
good/run.objective = @flow_matching()
bad/run.objective = @breaks()
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> oz.Comparison:
    """Two arms, compared from Python."""
    out = tmp_path_factory.mktemp("door") / "x"
    return oz.run(DIGITS, arms=["mean_flow", "dumo"], set=TINY, out=out)


def test_numbers_are_those_of_the_command_line_to_the_bit(compared, tmp_path):
    words = ["run", DIGITS, "--arm", "mean_flow", "--arm", "dumo", "--out", tmp_path / "x"]
    assert zoo(*words, *sets(*FILE_ONLY)).status == 0
    for arm, run in compared.runs.items():
        same = oz.load(tmp_path / "x" / arm)
        assert run.result.values == same.result.values
        ours, theirs = (load_file(r.folder / "model.safetensors") for r in (run, same))
        assert all(ours[name].equal(theirs[name]) for name in ours | theirs)


def test_table_has_rows_by_metric_and_nfe_with_seeds_and_cost(compared):
    table = compared.table()
    assert table.index.tolist() == ["mean_flow", "dumo"]
    run = compared.runs["dumo"].result
    assert table.loc["dumo", ("fd_pixels", 2)] == run.values["nfe2/fd_pixels"]
    assert table.loc["dumo", ("fd_pixels", "real")] == run.values["fd_pixels_floor"]
    cost = table.loc["dumo", "cost"]
    assert (cost["steps"], cost["parameters"]) == (4, run.num_params)
    assert table.loc["dumo", ("seeds", "")] == 1
    assert compared.failed == {}


def test_run_opens_its_network_history_samples_and_picture(compared):
    run = oz.load(compared.folder / "mean_flow")
    assert "run.objective = @mean_flow()" in run.config
    assert run.net.keys == ("u",)
    history = run.history("loss")
    assert history.index.tolist() == [1, 2, 3, 4]
    assert history["loss"].tolist() == read_record(run.folder).metrics["loss"].values.tolist()
    assert {"loss", "terms/u"} <= {*run.history().columns}

    three = run.sample(nfe=2, num=3, labels=3)
    assert three.shape == (3, 1, 8, 8)
    assert three.equal(run.sample(nfe=2, num=3, labels=[3, 3, 3]))
    assert three.equal(run.sample(nfe=2, num=3, labels=np.int64(3)))
    assert not three.equal(run.sample(nfe=2, num=3, labels=4))
    assert not three.equal(run.sample(nfe=2, num=3, labels=3, seed=1))
    small, large = run.show(nfe=(1, 2), num=2), run.show(nfe=(1, 2, 4), num=2)
    assert large.height > small.height > 8
    assert small._repr_png_().startswith(b"\x89PNG")  # what a notebook displays


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda run: run.history("los"), "Did you mean 'loss'"),
        (lambda run: run.sample(labels=10), "from 0 to 9"),
        (lambda run: run.sample(num=4, labels=[1, 2]), "4 of them"),
        (lambda run: run.sample(num=0), "1 or more"),
        (lambda run: run.sample(num="4"), "whole number"),
        (lambda run: run.sample(nfe=0), "nfe"),
        (lambda run: run.sample(num=2, labels=[0.5, 1.0]), "must be a class"),
        (lambda run: run.sample(labels="3"), "must be a class"),
        (lambda run: run.history(["loss"]), "nothing was recorded as"),
        (lambda run: run.show(nfe=2), r"nfe = 2 must be a list, such as nfe=\[2\]"),
        (lambda run: run.evaluate(nfe=1), "nfe = 1 must be a list"),
        (lambda run: run.evaluate(metrics="frechet"), "metrics = 'frechet' must be a list"),
        (lambda run: oz.report(run.folder, out="r"), "runs = .* must be a list"),
    ],
)
def test_requests_in_error_say_what_there_is(compared, call, what):
    with pytest.raises((ValueError, KeyError), match=what):
        call(compared.runs["mean_flow"])


def test_folder_of_a_comparison_is_no_run_and_names_those_in_it(compared):
    with pytest.raises(ValueError, match="There are runs in it: dumo, mean_flow"):
        oz.load(compared.folder)


def test_evaluation_is_the_commands(compared):
    run = compared.runs["mean_flow"]
    options = {"metrics": ("frechet",), "features": ("pixels",)}
    values = run.evaluate(num=60, nfe=[1], **options)
    again = zoo(
        "evaluate", run.folder, "--num", 60, "--nfe", 1, "--metrics", "frechet",
        "--features", "pixels", "--out", run.folder / "again",
    )  # fmt: skip
    assert again.status == 0
    assert f"{values['nfe1/fd_pixels']:.4g}" in again.out


def test_experiment_without_a_gin_file_is_recorded_like_any_other(tmp_path):
    made = oz.experiment(
        objective=oz.objectives.MeanFlow(weight=Adaptive(power=0.5)), backbone="dit",
        dataset="digits", steps=4, batch_size=8, num_samples=12, nfe=(1,), seed=3, log_every=1,
        recorder="jsonl", set={"dit.dim": 16, "dit.depth": 1, "dit.num_heads": 2, "dit.patch": 2,
                               "run.metric": "@mmd()"},
    )  # fmt: skip
    run = made.run(tmp_path / "y")
    assert run.folder == tmp_path / "y" / "mean_flow"
    assert run.result.seed == 3
    assert read_record(run.folder).params["adaptive.power"] == "0.5"
    # Its own text does the same again, from the command line.
    done = zoo("run", run.folder / "config.gin", "--out", tmp_path / "again")
    assert done.status == 0, done.err
    assert oz.load(tmp_path / "again" / "mean_flow").result.values == run.result.values


def test_experiment_refuses_what_nothing_uses(tmp_path):
    made = oz.experiment(
        objective="mean_flow", backbone="dit", dataset="digits", steps=2, set={"unet.channels": 8}
    )
    with pytest.raises(ValueError, match=r"nothing uses unet\.channels"):
        made.run(tmp_path / "y")
    with pytest.raises(KeyError, match="Did you mean 'mean_flow'"):
        oz.experiment(objective="mean_flo", backbone="dit", dataset="digits")


def test_failed_arm_is_named_and_the_others_are_carried(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Breaks:
        heads = ("v",)

        def loss(self, net, batch, rng):
            if batch.step == 2:
                raise RuntimeError("broken on purpose")
            return oz.objectives.FlowMatching().loss(net, batch, rng)

    file = tmp_path / "two.gin"
    file.write_text(ARMS)
    with (
        registry.objectives.temporary("breaks", Breaks),
        pytest.raises(oz.CellsFailed, match=r"bad failed: .*broken on purpose") as caught,
    ):
        quick_run(file, set=TINY, out=tmp_path / "x")
    assert list(caught.value.failed) == ["bad"]
    assert list(caught.value.comparison.runs) == ["good"]
    assert caught.value.comparison.table().index.tolist() == ["good"]


def test_two_comparisons_do_not_see_each_others_bindings_nor_the_callers(tmp_path):
    gin_setup.parse([], ["adamw.lr = 0.125"])
    small = TINY | {"run.steps": 2}
    first = quick_run(DIGITS, arms=["mean_flow"], set=small | {"adamw.lr": 0.5}, out=tmp_path / "a")
    second = quick_run(DIGITS, arms=["mean_flow"], set=small, out=tmp_path / "b")
    assert read_record(first.runs["mean_flow"].folder).params["adamw.lr"] == "0.5"
    assert read_record(second.runs["mean_flow"].folder).params["adamw.lr"] == "0.002"
    assert gin.query_parameter("adamw.lr") == 0.125
    fresh = quick_run(DIGITS, arms=["mean_flow"], set=small, out=tmp_path / "c")
    assert fresh.runs["mean_flow"].result.values == second.runs["mean_flow"].result.values


def test_calls_are_silent_unless_progress_is_wanted(tmp_path, capfd):
    small = TINY | {"run.steps": 2}
    quick_run(DIGITS, arms=["flow_matching"], set=small, out=tmp_path / "quiet")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    quick_run(DIGITS, arms=["flow_matching"], set=small, out=tmp_path / "loud", progress=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert "[1/1] flow_matching" in said.err
    assert "100% step 2" in said.err
    assert logging.getLogger("benchmarks").level == logging.NOTSET


@pytest.mark.parametrize(
    ("arms", "what"), [("dumo", "must be a list"), (None, "must be a list"), ([3], "must be names")]
)
def test_arms_that_are_no_list_of_names_are_refused(arms, what):
    with pytest.raises(ValueError, match=what):
        oz.run(DIGITS, arms=arms)


def test_instance_and_results_do_not_depend_on_the_file_nor_on_the_callers_state(tmp_path):
    """digits.gin binds adamw.lr; a part that is given as an object keeps its own."""
    given = TINY | {"run.steps": 2, "run.optimizer": AdamW()}
    plain = quick_run(DIGITS, arms=["mean_flow"], set=given, out=tmp_path / "a").runs["mean_flow"]
    assert read_record(plain.folder).params["optimizer/adamw.lr"] == str(AdamW().lr) != "0.002"
    torch.set_default_dtype(torch.float64)
    try:
        with gin.config_scope("mine"), torch.no_grad():
            again = quick_run(DIGITS, arms=["mean_flow"], set=given, out=tmp_path / "b")
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    same = again.runs["mean_flow"]
    assert same.result.values == plain.result.values
    assert read_record(same.folder).params == read_record(plain.folder).params


def test_experiment_refuses_what_contradicts_itself():
    parts = {"objective": "mean_flow", "backbone": "dit", "dataset": "digits"}
    with pytest.raises(ValueError, match=r"set has run\.steps, which an argument gives too"):
        oz.experiment(**parts, steps=2, set={"run.steps": 3})
    with pytest.raises(ValueError, match=r"make it a part with brackets: MeanFlow\(\)"):
        oz.experiment(**parts | {"objective": oz.objectives.MeanFlow})


def test_part_of_a_notebook_is_refused_by_workers_before_anything_runs(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Cell(FlowMatching):
        power: float = 1.0

    Cell.__module__ = "__main__"
    file = tmp_path / "own.gin"
    file.write_text(
        "include 'experiments/digits.gin'\nGrid.arms = ('a',)\na/run.objective = @own_cell()\n"
        "Grid.axes = {'own_cell.power': [0.5, 1.0]}\n"
    )
    with (
        registry.objectives.temporary("own_cell", Cell),
        pytest.raises(ValueError, match="Cell is defined in the notebook or script itself"),
    ):
        oz.grid(file, set=TINY, out=tmp_path / "g", workers=2)
    assert not (tmp_path / "g").exists()


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("grid") / "my_grid.gin"
    file.write_text(GRID)
    return file


def test_table_of_a_grid_by_one_of_its_axes(grid_file, tmp_path):
    found = quick_grid(grid_file, set=TINY | {"run.steps": 2}, out=tmp_path / "g")
    table = found.table(by="power")
    assert table.index.tolist() == [0.5, 1.0]
    assert table["seeds", ""].tolist() == [2, 2]
    values = [r.result.values["nfe1/fd_pixels"] for n, r in found.runs.items() if "power=0.5" in n]
    assert table.loc[0.5, ("fd_pixels", 1)] == pytest.approx(sum(values) / 2)
    with pytest.raises(KeyError, match=r"adaptive\.power"):
        found.table(by="n2n_every")
    again = quick_grid(grid_file, set=TINY | {"run.steps": 2}, out=tmp_path / "g")
    assert again.table().equals(found.table())


def test_examples_of_the_docstrings_are_right(grid_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = {claim: CLAIMS[claim] for claim in ("one loss per row", "labels")}  # all take long
    monkeypatch.setattr("benchmarks.conformance.report.claims_for", lambda name: few)
    # A rehearsal costs as much as such a run.
    monkeypatch.setattr("benchmarks.grids.comparison.rehearse", lambda *planned: None)
    Path("my_grid.gin").write_text(grid_file.read_text())
    names = {name: getattr(oz, name) for name in oz.__all__} | {"TINY": TINY | {"run.steps": 2}}
    runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
    tried = 0
    page = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    for name in ("run", "load", "grid", "experiment", "parts"):  # the page runs the slow others
        example = parser.get_doctest(getattr(oz, name).__doc__, names, name, None, None)
        tried += runner.run(example, clear_globs=False).attempted
    assert zoo("export", "x/mean_flow", "--out", "exported").status == 0
    example = parser.get_doctest(oz.load_network.__doc__, names, "load_network", None, None)
    tried += runner.run(example, clear_globs=False).attempted
    page = page.replace("\n```\n", "\n\n")  # an example ends where its block does
    of_page = parser.get_doctest(page, {}, "docs/python.md", "docs/python.md", 0)
    tried += runner.run(of_page).attempted
    assert tried >= 25
    assert runner.failures == 0
    untold = [name for name in oz.__all__ if f"oz.{name}" not in page]
    assert untold == []


def test_check_of_a_variant_is_that_of_the_command_line():
    found = oz.check(
        "progressive", set={"progressive.times": BetaPair(a=2.0), "progressive.steps": 9}
    )
    bound = "progressive.times = @beta_pair()", "beta_pair.a = 2.0", "progressive.steps = 9"
    assert all(binding in found.objective for binding in bound)
    assert not found.problems()
    assert oz.check("beta_pair").objective == "beta_pair"  # nothing is left bound
    with pytest.raises(ValueError, match="changes nothing"):
        oz.check("beta_pair", set={"dumo.omega": 0.5})
    with pytest.raises(ValueError, match="not the name of a binding"):
        oz.check("beta_pair", set={"beta_pair.a = 2": 1})


def test_every_name_is_documented_with_an_example():
    functions = [getattr(oz, name) for name in {*oz.__all__} - {"objectives"} if name.islower()]
    assert len(functions) == 8
    assert [f.__name__ for f in functions if ">>>" not in (f.__doc__ or "")] == []


def test_import_is_light():
    code = "import sys, objective_zoo; print({'torch', 'gin', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A current folder with packages of our names that are somebody else's."""
    for name in ("benchmarks", "zoo", "registry"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('foreign {name}')\n")
    return tmp_path


def python(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip


def test_module_and_door_work_beside_foreign_packages(foreign):
    done = python(foreign, "-c", "import objective_zoo as oz; print(len(oz.parts('objective')))")
    assert int(done.stdout) >= 5, done.stderr
    # The module imports nothing from the current folder, as the script `objective-zoo`.
    (foreign / "einops.py").write_text("raise RuntimeError('foreign einops')\n")
    done = python(foreign, "-m", "objective_zoo", "list", "--kind", "objective")
    assert "mean_flow" in done.stdout, done.stderr


def test_package_of_our_name_that_is_loaded_already_is_named(foreign):
    (foreign / "benchmarks" / "__init__.py").write_text("")
    done = python(foreign, "-c", "import benchmarks, objective_zoo")
    assert "a module 'benchmarks' is loaded already" in done.stderr
    assert str(foreign / "benchmarks") in done.stderr


@pytest.mark.slow
def test_workers_of_a_grid_work_beside_foreign_packages(foreign, grid_file):
    small = sets(*FILE_ONLY, "run.steps = 2", "Grid.repeat = {}", "Grid.axes = {}")
    words = ["grid", grid_file, "--workers", "1", "--out", foreign / "g", *small]
    done = python(foreign, "-m", "objective_zoo", *words)
    assert done.returncode == 0, done.stderr
    assert len(list((foreign / "g").glob("*/result.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("start", ["--ranks 2", "torchrun"])
def test_processes_of_a_run_are_ours_beside_foreign_packages(foreign, start):
    """--ranks alone starts them; so does torchrun with the documented module."""
    words = ["-m", "objective_zoo", "run", DIGITS, "--arm", "flow_matching", "--out", "out"]
    words += sets(*FILE_ONLY, "run.steps = 2")
    if start == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = python(foreign, *launcher, *words)
    else:
        done = python(foreign, *words, *start.split())
    assert done.returncode != 0
    assert "foreign" not in done.stderr
    assert "torch_engine runs in one process, and there are 2" in done.stderr
