"""The import directions, and where gin may be used: what keeps the five packages apart."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "registry": set(),
    "zoo": {"registry"},
    "backbones": {"registry"},
    "trainers": {"registry", "zoo", "backbones"},
    "benchmarks": {"registry", "zoo", "backbones", "trainers"},
}


def sources(package: str) -> list[tuple[Path, ast.Module]]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [(file.relative_to(ROOT), ast.parse(file.read_text())) for file in files]


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if node.module and not node.level else "."


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_lies_below(package):
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[package] - {package} | {"tests", "."}
    found = [(str(f), name) for f, tree in sources(package) for name in imported(tree)]
    assert found, f"{package} is empty: the walk looks in the wrong place"
    assert [(file, name) for file, name in found if name in forbidden] == []


def test_imports_inside_functions_and_relative_ones_are_seen():
    tree = ast.parse(
        "def f():\n    from trainers.ema import Ema\n    from . import x\n    import zoo.ops"
    )
    assert list(imported(tree)) == ["trainers", ".", "zoo"]


def test_run_is_the_only_configurable():
    found = [
        (str(file), ast.unparse(node))
        for package in MAY_IMPORT
        for file, tree in sources(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        if ast.unparse(node) in ("gin.configurable", "gin.external_configurable", "configurable")
    ]
    assert found == [("benchmarks/experiments/build.py", "gin.configurable")]


def test_only_the_registry_reaches_into_gin():
    private = [
        str(file)
        for package in MAY_IMPORT
        for file, tree in sources(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node).startswith(("gin.config._", "config._"))
    ]
    assert {file.split("/")[0] for file in private} == {"registry"}


def test_folder_gin_holds_data_only():
    """A Python file in gin/ would turn the folder into a package that hides gin-config."""
    assert [f for f in (ROOT / "gin").rglob("*") if f.is_file() and f.suffix != ".gin"] == []


@pytest.mark.parametrize("module", ["registry.gin_setup", "benchmarks.cli"])
def test_import_is_light(module):
    """`objective-zoo --help` answers at once: nothing heavy is imported before it is needed."""
    heavy = ("torch", "mlflow", "deepspeed", "matplotlib", "timm", "scipy", "sklearn", "numpy")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_module_needs_itself_to_be_imported():
    """A cycle works or not by which of its modules is imported first."""
    trees = {_module(file): tree for package in MAY_IMPORT for file, tree in sources(package)}
    needed = {name: set(_needed(tree, trees)) - {name} for name, tree in trees.items()}
    sorter = graphlib.TopologicalSorter(needed)
    sorter.prepare()
    assert sum(map(len, needed.values())) > len(trees)


def _module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _needed(tree: ast.Module, known: Container[str]) -> Iterator[str]:
    """The modules among the known ones that are imported while this one is."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in known else node.module for name in inner]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in found if name in known)
