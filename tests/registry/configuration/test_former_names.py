"""A parameter that was renamed is still bound by its former name, wherever a name can be bound."""

from __future__ import annotations

import inspect
import logging
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import gin
import pytest

from benchmarks.grids import axes
from benchmarks.grids.request import Request
from registry import gin_setup, kinds, weights
from registry.configuration import former_names
from registry.plugins import load_plugins

OLD, NEW = "test_robust.offset", "test_robust.floor"


@dataclass(frozen=True, kw_only=True)
class Robust:
    renamed_parameters: ClassVar = {"offset": "floor"}

    floor: float = 0.1
    power: float = 1.0


def job(weight=None, seed=0):
    return weight


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """gin's registry with a part of which a parameter was renamed, and a function to build it."""
    load_plugins()  # into the lasting registry: modules that are imported register but once
    fresh = type(gin.config._REGISTRY)()  # its copy() would share the tree of names
    for selector, found in gin.config._REGISTRY.items():
        fresh[selector] = found
    monkeypatch.setattr(gin.config, "_REGISTRY", fresh)
    gin.register("job", module="test")(job)
    former_names._warn.cache_clear()
    with weights.temporary("test_robust", Robust):
        yield


def write(folder: Path, text: str, name: str = "a.gin") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def built(arm: str = "") -> Robust:
    with gin_setup.arm(arm):
        return gin.get_configurable(job)()


@pytest.mark.parametrize(
    ("text", "binding", "arm"),
    [
        (f"{OLD} = 2.0", "", ""),
        ("test_robust:\n  offset = 2.0", "", ""),
        ("weight.test_robust.offset = 2.0", "", ""),
        (f"TWO = 2.0\n{OLD} = %TWO", "", ""),
        (f"{NEW} = 1.0", f"{OLD} = 2.0", ""),  # a later text wins, under either name
        (f"{OLD} = 1.0", f"{NEW} = 2.0", ""),
        (f"{NEW} = 1.0\na/{OLD} = 2.0", "", "a"),
        (f"{OLD} = 1.0\na/{NEW} = 2.0", "", "a"),
    ],
)
def test_former_name_binds_the_parameter(tmp_path, text, binding, arm):
    file = write(tmp_path, f"job.weight = @test_robust()\n{text}\n")
    gin_setup.parse([file], [binding] if binding else [])
    assert built(arm) == Robust(floor=2.0)
    assert gin_setup.inert_bindings(arm) == ()


def test_former_name_in_an_included_file_is_replaced_by_the_present_one(tmp_path):
    write(tmp_path, f"{OLD} = 1.0\n", "inner.gin")
    file = write(tmp_path, f"include 'inner.gin'\njob.weight = @test_robust()\n{NEW} = 2.0\n")
    gin_setup.parse([file])
    assert built() == Robust(floor=2.0)


def test_every_function_gives_the_present_name(tmp_path):
    gin_setup.parse([write(tmp_path, f"job.weight = @test_robust()\na/{OLD} = 2.0\n{OLD} = 3.0")])
    assert (gin_setup.query(OLD), gin_setup.query(NEW), gin_setup.query(f"a/{OLD}")) == (3, 3, 2)
    assert gin_setup.scope_bindings("a") == {NEW: "2.0"}
    assert gin_setup.overridden_bindings("a") == (NEW,)
    assert gin_setup.inert_bindings("a") == ("job.weight", f"a/{NEW}", NEW)
    assert gin_setup.bindings_of(f"a/{OLD} = 2.0") == {f"a/{NEW}": "2.0"}
    assert gin_setup.own_key("a/weight.test_robust.offset") == f"a/{NEW}"
    assert gin_setup.former_key(f"a/{NEW}") == f"a/{OLD}"
    assert gin_setup.former_key("test_robust.power") == "test_robust.power"
    assert "offset" not in gin_setup.full_text()
    built()
    assert set(gin_setup.operative_values()) >= {NEW}
    assert "offset" not in gin_setup.operative_text()


def test_binding_that_nothing_uses_is_found_under_its_former_name(tmp_path):
    file = write(tmp_path, f"job.seed = 1\n{OLD} = 2.0\n")
    gin_setup.parse([file])
    built()
    assert gin_setup.inert_bindings() == (NEW,)
    assert NEW in Request(file=file).own_keys(("",))
    assert Request(file=file, bindings=(f"a/{OLD} = 1.0",)).bound_keys == {f"a/{NEW}"}


def test_former_name_is_told_once_for_each_text(tmp_path, caplog):
    text = f"{OLD} = 1.0\na/{OLD} = 2.0\njob.weight = @test_robust()\n"
    one, two = write(tmp_path, text, "one.gin"), write(tmp_path, text, "two.gin")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # as one command does
            gin_setup.parse([one, two], [f"{OLD} = 3.0"])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert f"{OLD} is called {NEW} now" in lines[0]
    for line, where in zip(lines, (str(one), str(two), "--set"), strict=True):
        assert where in line
    caplog.clear()
    gin_setup.parse([write(tmp_path, f"{NEW} = 1.0", "three.gin")])
    assert not caplog.records


@pytest.mark.parametrize("scope", ["", "a/"])
@pytest.mark.parametrize("order", [(OLD, NEW), (NEW, OLD)])
def test_both_names_in_one_text_and_scope_are_refused(tmp_path, scope, order):
    file = write(tmp_path, "".join(f"{scope}{key} = 1.0\n" for key in order))
    message = f"binds both {scope}{OLD} and {scope}{NEW}.*Remove the line with {scope}{OLD}"
    with pytest.raises(ValueError, match=f"(?s){file} {message}"):
        gin_setup.parse([file])
    with pytest.raises(ValueError, match=message):
        gin_setup.parse([], [f"{scope}{key} = 1.0" for key in order])
    troubles: list[str] = []
    gin_setup.parse([file], troubles=troubles)
    assert [OLD in trouble and NEW in trouble for trouble in troubles] == [True]


def test_shipped_parts_declare_former_names_of_parameters_that_they_have():
    load_plugins()
    parts = [kind.get(name) for kind in kinds for name in kind.names()]
    renaming = [part for part in parts if hasattr(part, "renamed_parameters")]
    assert len(renaming) >= 2
    for part in renaming:
        has = set(inspect.signature(part).parameters)
        assert has.issuperset(part.renamed_parameters.values()), part
        assert has.isdisjoint(part.renamed_parameters), part


# Axes


def declared(tmp_path: Path, text: str) -> axes.Declared:
    gin_setup.parse([write(tmp_path, text)])
    return axes.declared(tmp_path)


@pytest.mark.parametrize("kind", ["axes", "repeat"])
def test_axis_may_have_the_former_name(tmp_path, kind):
    text = f"job.weight = @test_robust()\nGrid.{kind} = {{'{OLD}': [2.0, 3.0]}}\n"
    cells = declared(tmp_path, text).cells(("a",))
    found = []
    for arm, setting in cells:
        gin_setup.parse([tmp_path / "a.gin"], [*axes.bindings(arm, setting), "a/job.seed = 1"])
        found.append(built("a"))
    assert found == [Robust(floor=2.0), Robust(floor=3.0)]


def test_axes_refuse_one_parameter_under_both_names(tmp_path):
    both = f"{{'{OLD}': [1.0], '{NEW}': [2.0]}}"
    with pytest.raises(ValueError, match=f"{OLD} and {NEW}, which are one parameter"):
        declared(tmp_path, f"Grid.axes = {both}\n")
    text = f"Grid.axes = {{'{OLD}': [1.0]}}\nGrid.repeat = {{'{NEW}': [2.0]}}\n"
    with pytest.raises(ValueError, match="in Grid.axes and in Grid.repeat"):
        declared(tmp_path, text)


@pytest.mark.parametrize(("axis", "bound"), [(OLD, NEW), (NEW, OLD)])
def test_request_may_not_bind_an_axis_under_its_other_name(tmp_path, axis, bound):
    file = write(tmp_path, f"Grid.axes = {{'{axis}': [1.0]}}\n")
    with pytest.raises(ValueError, match="has no effect: the file's axis"):
        Request(file=file, bindings=(f"{bound} = 1.0",)).axes()
