"""docs/write-your-own.md: its parts meet their contracts, and its gin texts make runs."""

from __future__ import annotations

import ast
import builtins
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import entries, sets, zoo

import benchmarks.grids.axes  # noqa: F401  registers Grid
import registry
from benchmarks.conformance.parts.kinds import CHECKED, results_of
from benchmarks.conformance.parts.kinds import subject_of as part_of
from benchmarks.conformance.report import CLAIMS, variant
from benchmarks.conformance.report import run as results_in
from benchmarks.experiments.build import run
from registry import gin_setup
from registry.plugins import import_file, load_plugins
from registry.protocols import parts

PAGE = Path(__file__).parents[1] / "docs" / "write-your-own.md"
TEXT = PAGE.read_text()
SMALL = (
    "run.steps = 4",
    "run.batch_size = 16",
    "run.num_samples = 64",
    "run.log_every = 1",
    "run.recorder = @jsonl()",
)
SMALL_MLP = ("mlp.dim = 8", "mlp.depth = 1")
WITHOUT_CHECK = ("my_derivative", "my_noise", "my_metric")  # the page says where they are judged
QUICKLY = (
    "one loss per row",
    "few rows",
    "labels",
    "shares of a batch",
    "gradient reaches every head",
    "no gradient through targets",
    "fixed point at a Gaussian",
)
QUICK = {name: CLAIMS[name] for name in QUICKLY}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


BASE, *LINES = blocks("gin")
NAMES = {
    name: getattr(registry, kind)
    for kind, name in re.findall(r'@(\w+)\.register\("(\w+)"\)', "\n".join(blocks("python")))
}
COMMANDS = dict.fromkeys(
    re.findall(r"objective-zoo check (\w+) --import mine.py(?: --set '([^']*)')?", TEXT)
)
PARTS = [name for name, _ in COMMANDS if NAMES.get(name) in {checked.kind for checked in CHECKED}]
OBJECTIVES = [(name, change) for name, change in COMMANDS if name not in PARTS]
OBJECTIVES += [
    (name, "")
    for name, kind in NAMES.items()
    if kind is registry.objectives and (name, "") not in COMMANDS
]
each_objective = pytest.mark.parametrize(("name", "change"), OBJECTIVES)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The file `mine.py` of the page, with its parts registered; all is forgotten at the end."""
    load_plugins()
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text("\n\n".join(blocks("python")))
    path = list(sys.path)
    import_file(file)
    yield file
    sys.modules.pop("mine")
    sys.path[:] = path
    for name, kind in NAMES.items():
        kind._remove(name)


def written(mine: Path, lines: str) -> Path:
    file = mine.with_name("mine.gin")
    file.write_text(f"{BASE}\n{lines}")
    return file


def classes_in(experiment) -> set[type]:
    """The classes of everything that the run is made of."""
    held = [getattr(experiment, name) for name in ("objective", "dataset", "sampler", "metric")]
    held += [part for one in held for _, part in parts(one)]
    net = experiment.net
    return {type(part) for part in (*held, net.trunk, *net.heads.values(), net.parametrisation)}


def problems(name: str, change: str, claims) -> list[str]:
    with variant(name, [change] if change else []) as subject:
        found = list(results_in(subject, claims))
    return [f"{r.claim}: {r.reason}" for r in found if r.status == "FAIL"]


def test_every_kind_of_part_of_a_method_has_an_example():
    surroundings = ("VAE", "feature extractor", "engine", "optimizer", "schedule")
    surroundings += ("recorder", "launcher", "pruner")
    missing = {kind.kind for kind in registry.kinds} - {kind.kind for kind in NAMES.values()}
    assert missing == {*surroundings}


def test_every_part_is_bound_in_gin_and_checked_by_a_command():
    assert [name for name in NAMES if f"@{name}" not in "\n".join(LINES)] == []
    changes = " ".join(change for _, change in COMMANDS)
    named = {*PARTS, *(name for name, _ in OBJECTIVES), *re.findall(r"@(\w+)", changes)}
    assert {*NAMES} - named == {*WITHOUT_CHECK}
    kinds = [kind.kind for kind in (NAMES[name] for name in PARTS)]
    assert sorted(kinds) == sorted(checked.kind.kind for checked in CHECKED)


def test_every_example_works_with_the_first_imports_alone():
    first, *examples = blocks("python")
    for example in examples:
        nodes = list(ast.walk(ast.parse(first + example)))
        known = {*vars(builtins), *(node.arg for node in nodes if isinstance(node, ast.arg))}
        known |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        known |= {node.name for node in nodes if isinstance(node, ast.alias)}
        used = {node for node in nodes if isinstance(node, ast.Name)}
        known |= {node.id for node in used if isinstance(node.ctx, ast.Store)}
        assert {node.id for node in used} <= known, example


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "my_head")) for n in PARTS]
)
def test_part_meets_its_claims(mine, name):
    results = list(results_of(NAMES[name], part_of(NAMES[name], name)))
    assert [r.reason for r in results if r.status == "FAIL"] == []
    assert any(r.status == "ok" for r in results)


@each_objective
def test_objective_meets_the_quick_claims(mine, name, change):
    assert problems(name, change, QUICK) == []


@pytest.mark.slow
@each_objective
def test_objective_meets_all_claims(mine, name, change):
    assert problems(name, change, CLAIMS) == []


@pytest.mark.parametrize("lines", LINES, ids=lambda lines: lines.split("@")[-1].split("(")[0])
def test_lines_of_gin_make_a_run_of_the_parts_that_they_name(mine, lines):
    gin_setup.parse([written(mine, lines)], [*SMALL, *SMALL_MLP])
    made = classes_in(run())
    bound = [name for name in NAMES if f"@{name}" in lines]
    assert [name for name in bound if NAMES[name].get(name) not in made] == []


def test_law_changes_over_the_run_as_its_comment_says(mine):
    law = registry.time_laws.get("my_times")()
    t = torch.linspace(0, 1, 5)
    assert law.at_step(0).cdf(t).equal(t)
    assert law.at_step(law.steps) == law


def test_derivative_is_that_of_dual_numbers(mine):
    def fn(x, t):
        return torch.sin(x) * t

    points = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, exact = (
        registry.derivatives.get(name)()(fn, (points[0], points[1]), (points[1], points[0]))
        for name in ("my_derivative", "dual")
    )
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=0)


def test_run_of_all_parts_trains_samples_and_measures(mine, tmp_path):
    done = zoo("run", written(mine, LINES[-1]), "--out", tmp_path / "out", *sets(*SMALL))
    assert done.status == 0, done.err
    (folder,) = (file.parent for file in tmp_path.glob("out/*/result.json"))
    values = {name for entry in entries(folder, "metrics") for name in entry["values"]}
    assert {"loss", "terms/u", "nfe1/mean_gap", "nfe2/mean_gap"} <= values
