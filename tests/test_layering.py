"""The architecture: import directions between folders, no circle, and where gin may be used."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {  # each package, and those that it may import
    "registry": set(),
    "zoo": {"registry"},
    "backbones": {"registry"},
    "trainers": {"registry", "zoo", "backbones"},
    "benchmarks": {"registry", "zoo", "backbones", "trainers"},
    "objective_zoo": {"registry", "zoo", "backbones", "trainers", "benchmarks"},
}
LEAVES = {
    "console",
    "locks",
    "markdown",
    "threads",
}  # modules of benchmarks that any of its folders may use
INSIDE = {  # the folders of benchmarks, and those that each may import
    "data": set(),
    "records": set(),
    "metrics": {"data"},
    "latents": {"data"},
    "launchers": {"records"},
    "experiments": {"data", "latents", "metrics", "records"},
    "conformance": set(),
    "runs": {"experiments", "data", "metrics", "records"},
    "grids": {"runs", "experiments", "launchers", "data", "records"},
    "evaluation": {"runs", "data", "metrics", "records"},
    "report": {"grids", "runs", "data", "records"},
    "planning": {"grids", "runs", "experiments"},
    "speed": {"grids", "runs", "experiments", "data", "latents", "metrics", "records"},
    "pages": {"conformance", "grids", "report", "runs", "speed"},
}
# Those that may import every folder.
PROGRAMS = {
    "cli",
    "worker",
    "loading",
    "method_pages",
    "plan_check",
    "waiting",
}  # they print and exit, as commands do
ENTRIES = PROGRAMS | {"builtin_parts", "exported", "commands"}
MOST_MODULES = 12  # of a folder
CATALOGUES = {"zoo/objectives"}  # whose modules are alike, a method each


def sources(package: str) -> list[tuple[Path, ast.Module]]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [(file.relative_to(ROOT), ast.parse(file.read_text())) for file in files]


def trees() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name."""
    return {_module(file): tree for package in BELOW for file, tree in sources(package)}


def _module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> Iterator[str]:
    """Packages at the top level that a module imports, in functions too; '.' for a relative one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if node.module and not node.level else "."


def needed(tree: ast.Module, known: Container[str]) -> Iterator[str]:
    """The modules among the known ones that a module imports, inside functions too.

    An import for annotations alone, under TYPE_CHECKING, counts as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in known else node.module for name in inner]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in found if name in known)


@pytest.mark.parametrize("package", BELOW)
def test_package_imports_only_what_lies_below(package):
    forbidden = set(BELOW) - BELOW[package] - {package} | {"tests", "."}
    found = [(str(f), name) for f, tree in sources(package) for name in imported(tree)]
    assert found, f"{package} is empty: the walk looks in the wrong place"
    assert [(file, name) for file, name in found if name in forbidden] == []


def test_folder_of_benchmarks_imports_only_what_lies_below():
    known = trees()
    wrong, used = [], set()
    for name, tree in known.items():
        if not name.startswith("benchmarks.") or name.split(".")[1] in ENTRIES | LEAVES:
            continue
        folder = name.split(".")[1]
        for target in needed(tree, known):
            if not target.startswith("benchmarks."):
                continue
            place = target.split(".")[1]
            used.add((folder, place))
            if place not in INSIDE[folder] | LEAVES | {folder}:
                wrong.append((name, target))
    assert wrong == []
    allowed = {(folder, place) for folder, below in INSIDE.items() for place in below}
    assert allowed <= used, "a direction that nothing uses is taken out of the list"


def test_folders_of_benchmarks_have_an_order():
    order = list(graphlib.TopologicalSorter(INSIDE).static_order())
    assert order.index("launchers") < order.index("grids")


def test_leaves_of_benchmarks_import_nothing_of_it():
    known = trees()
    found = {name: set(needed(known[f"benchmarks.{name}"], known)) for name in LEAVES}
    assert {n for names in found.values() for n in names if n.startswith("benchmarks")} == set()


def test_no_module_imports_itself_by_a_circle():
    """Late imports, inside functions, count: they hide a circle and do not open it."""
    known = trees()
    graph = {name: set(needed(tree, known)) - {name} for name, tree in known.items()}
    # A package that re-exports its modules is not entered by them: they name each other directly.
    graphlib.TopologicalSorter(graph).prepare()
    assert sum(map(len, graph.values())) > 3 * len(known)


def test_a_circle_of_late_imports_is_seen():
    known = {
        "a": ast.parse("import b"),
        "b": ast.parse("def f():\n    from c import g"),
        "c": ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"),
    }
    graph = {name: set(needed(tree, known)) for name, tree in known.items()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_no_folder_holds_more_modules_than_one_can_look_over():
    folders = {}
    for package in BELOW:
        for file, _ in sources(package):
            if file.name != "__init__.py":
                folders.setdefault(str(file.parent), []).append(file.name)
    full = {f for f, names in folders.items() if len(names) > MOST_MODULES}
    assert full == CATALOGUES


def test_every_folder_says_what_lives_there():
    documented = {
        str(file.parent): ast.get_docstring(tree)
        for package in BELOW
        for file, tree in sources(package)
        if file.name == "__init__.py"
    }
    folders = {str(file.parent) for package in BELOW for file, _ in sources(package)}
    assert [folder for folder in sorted(folders) if not documented.get(folder)] == []


def test_tests_mirror_the_folders():
    code = {str(file.parent) for package in BELOW for file, _ in sources(package)}
    root = ROOT / "tests"
    tests = {str(file.parent.relative_to(root)) for file in root.rglob("test_*.py")}
    assert sorted(tests - code) == ["."]  # tests of the whole


def test_imports_inside_functions_and_relative_ones_are_seen():
    tree = ast.parse(
        "def f():\n    from trainers.ema import Ema\n    from . import x\n    import zoo.ops"
    )
    assert list(imported(tree)) == ["trainers", ".", "zoo"]


def prints_or_exits(tree: ast.Module) -> Iterator[str]:
    """What writes to stdout or ends the process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            if not any(word.arg == "file" for word in node.keywords):
                yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.exit", "sys.stdout"):
            yield ast.unparse(node)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(raised) == "SystemExit":
                yield "SystemExit"
        elif isinstance(node, ast.Name) and node.id in ("exit", "quit"):
            yield node.id


def test_the_library_neither_prints_nor_exits():
    shows = "benchmarks.console"  # it stands between the streams and whoever prints
    programs = {f"benchmarks.{name}" for name in PROGRAMS} | {shows}
    found = {
        name: list(prints_or_exits(tree))
        for name, tree in trees().items()
        if name not in programs | {"objective_zoo.__main__"}
        and not name.startswith("benchmarks.commands")
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_prints_and_exits_are_seen():
    text = (
        "def main():\n    print(1)\n    sys.exit()\n    raise SystemExit\n    raise SystemExit(2)"
    )
    found = sorted(prints_or_exits(ast.parse(text)))
    assert found == ["SystemExit", "SystemExit", "print(1)", "sys.exit"]
    noticed = "try:\n    run()\nexcept SystemExit as end:\n    note(end)"
    assert not list(prints_or_exits(ast.parse(noticed)))


def test_one_class_name_has_one_meaning():
    names = [
        node.name
        for tree in trees().values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert len(names) > 200
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_run_is_the_only_configurable():
    found = [
        (str(file), ast.unparse(node))
        for package in BELOW
        for file, tree in sources(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        if ast.unparse(node) in ("gin.configurable", "gin.external_configurable", "configurable")
    ]
    assert found == [("benchmarks/experiments/build.py", "gin.configurable")]


def test_only_the_registry_reaches_into_gin():
    private = [
        str(file)
        for package in BELOW
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
