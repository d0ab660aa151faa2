"""The registry: names, contracts, gin injection."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import gin
import pytest
from hypothesis import given
from hypothesis import strategies as st

import registry
from registry import heads, objectives, parametrisations, samplers, time_laws, weights
from registry.core import Registry, summary


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Multiply by a factor.

    More about it.
    """

    factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Slotted:
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Toy:
    """An objective that does nothing."""

    heads: ClassVar = ("u",)

    weight: Scale = field(default_factory=Scale)

    def loss(self, net, batch, rng):
        return None


class Module:
    """Stands for an nn.Module: positional arguments, no dataclass."""

    def __init__(self, width: int, depth: int = 1):
        self.size = (width, depth)


@pytest.fixture(autouse=True)
def parts():
    with (
        weights.temporary("test_scale", Scale),
        weights.temporary("test_slotted", Slotted),
        objectives.temporary("test_toy", Toy),
        registry.backbones.temporary("test_module", Module),
    ):
        yield


# Names


@given(st.text(max_size=12))
def test_names_that_are_not_snake_case_are_refused(name):
    good = name.isascii() and name.isidentifier() and name == name.lower() and name[0] != "_"
    toys = Registry("toy")
    if not good:
        with pytest.raises(ValueError, match="not snake_case"):
            toys.register(name)(type("Part", (), {}))
        assert toys.names() == ()


@pytest.mark.parametrize("name", ["run", "macro", "import", "singleton"])
def test_names_that_gin_uses_are_refused(name):
    with pytest.raises(ValueError, match="means something else in gin"):
        weights.register(name)(type("Part", (), {}))


@pytest.mark.parametrize("kind", [weights, time_laws], ids=lambda kind: kind.kind)
def test_taken_name_is_refused_by_every_kind_and_names_the_owner(kind):
    with pytest.raises(ValueError, match=r"taken by the weight .*Scale \(.*test_registry.py:\d+\)"):
        kind.register("test_scale")(type("Other", (), {}))
    assert weights.get("test_scale") is Scale


def test_taken_name_of_the_same_class_in_another_kind_is_refused():
    with pytest.raises(ValueError, match="taken by the weight"):
        time_laws.register("test_scale")(Scale)
    assert "test_scale" in weights


def test_second_name_for_one_class_is_refused():
    with pytest.raises(ValueError, match="registered as 'test_scale' already"):
        weights.register("test_scale_again")(Scale)
    assert weights.build("test_scale") == Scale()


def test_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(KeyError, match="Did you mean 'test_scale'.*Registered: .*test_slotted"):
        weights.get("test_scal")


def test_unknown_name_says_which_other_kind_has_it():
    with pytest.raises(KeyError, match="'test_toy' is a objective"):
        weights.get("test_toy")


def test_name_of_finds_classes_instances_and_subclasses():
    class Finer(Scale):
        pass

    assert weights.name_of(Scale) == "test_scale"
    assert weights.name_of(Finer()) == "test_scale"
    with weights.temporary("test_finer", Finer):
        assert weights.name_of(Finer()) == "test_finer"
    with pytest.raises(KeyError, match="not a registered weight"):
        weights.name_of(Toy())


def test_temporary_leaves_nothing_behind_after_an_error():
    class Local:
        pass

    with pytest.raises(RuntimeError), weights.temporary("test_local", Local):
        raise RuntimeError
    assert "test_local" not in weights
    with pytest.raises(ValueError, match="No configurable"):
        gin.parse_config("test_local.factor = 1")
    with weights.temporary("test_other", Local):
        assert weights.name_of(Local) == "test_other"


def test_every_kind_is_exported_and_listed_once():
    names = {*registry.__all__} - {"kinds", "kind_of", "sees_call"}
    exported = {name: getattr(registry, name) for name in names}
    assert all(isinstance(kind, Registry) for kind in exported.values())
    assert sorted(k.kind for k in exported.values()) == sorted(k.kind for k in registry.kinds)
    assert len({kind.kind for kind in registry.kinds}) == len(registry.kinds)


def test_summary_is_the_first_line_of_the_class_itself():
    class Silent(Toy):
        pass

    assert summary(Scale) == "Multiply by a factor"
    assert summary(Silent) == ""


# One definition that runs twice


SOURCE = """
from dataclasses import dataclass
from registry import weights

@weights.register("test_twice")
@dataclass(frozen=True)
class Twice:
    value: int = 0
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch):
    def load(file: str, name: str):
        (tmp_path / file).write_text(SOURCE)
        spec = importlib.util.spec_from_file_location(name, tmp_path / file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    weights._remove("test_twice")


def test_same_file_imported_twice_is_one_part(load):
    load("part.py", "first")
    second = load("part.py", "second")
    assert weights.get("test_twice") is second.Twice
    gin.parse_config("test_twice.value = 3")
    assert weights.build("test_twice") == second.Twice(3)


def test_same_name_in_another_file_is_refused(load):
    first = load("part.py", "first")
    with pytest.raises(ValueError, match=r"taken by the weight first.Twice \(.*part.py:\d"):
        load("copy.py", "second")
    assert weights.get("test_twice") is first.Twice


def test_same_name_in_two_functions_is_refused():
    def make():
        class Local:
            pass

        return Local

    with (
        weights.temporary("test_local", make()),
        pytest.raises(ValueError, match="taken by the weight"),
    ):
        weights.register("test_local")(make())


def test_class_that_breaks_its_contract_does_not_replace_the_old_one():
    broken = type("Toy", (), {"heads": "u", "__module__": __name__})
    broken.__qualname__ = Toy.__qualname__
    with pytest.raises(ValueError):
        objectives.register("test_toy")(broken)
    assert objectives.get("test_toy") is Toy


def test_notebook_cell_that_runs_again_replaces_its_part(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # it has no file
    cells = [type("Cell", (), {"__module__": "__main__"}) for _ in range(2)]
    with weights.temporary("test_cell", cells[0]):
        assert weights.register("test_cell")(cells[1]) is cells[1]
        assert weights.get("test_cell") is cells[1]


# gin


def test_gin_reaches_built_parts_but_not_plain_calls():
    gin.parse_config("test_scale.factor = 2.0")
    assert weights.build("test_scale").factor == 2.0
    assert Scale().factor == 1.0


def test_gin_does_not_reach_a_default_factory():
    gin.parse_config("test_scale.factor = 2.0")
    assert objectives.build("test_toy").weight.factor == 1.0
    gin.parse_config("test_toy.weight = @test_scale()")
    assert objectives.build("test_toy").weight.factor == 2.0


def test_arguments_of_build_win_over_gin():
    gin.parse_config("test_module.depth = 3\ntest_module.width = 5")
    assert registry.backbones.build("test_module").size == (5, 3)
    assert registry.backbones.build("test_module", width=7).size == (7, 3)


def test_scope_reaches_parts_inside_parts():
    gin.parse_config("""
        test_toy.weight = @test_scale()
        test_scale.factor = 2.0
        arm/test_scale.factor = 3.0
    """)
    assert objectives.build("test_toy").weight.factor == 2.0
    with gin.config_scope("arm"):
        assert objectives.build("test_toy").weight.factor == 3.0


@pytest.mark.parametrize("name", ["test_scale", "test_slotted"])
def test_built_instance_is_of_the_class_itself_and_pickles(name):
    gin.parse_config(f"{name}.factor = 2.0")
    part = weights.build(name)
    assert type(part) is weights.get(name)
    assert pickle.loads(pickle.dumps(part)) == part


# Contracts


def objective(**members):
    return type("Made", (), {"heads": ("u",), "loss": Toy.loss, **members})


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"heads": "u"}, "tuple of output names"),
        ({"heads": ()}, "tuple of output names"),
        ({"heads": 3}, "tuple of output names"),
        ({"heads": None}, "tuple of output names"),
        ({"heads": ("u", 1)}, "tuple of output names"),
        ({"loss": None}, r"needs a method loss\(self, net, batch, rng\)"),
        ({"loss": lambda self, net: None}, r"it must accept loss\(self, net, batch, rng\)"),
        ({"loss": lambda self, net, batch, *, rng: None}, "it must accept loss"),
    ],
)
def test_objective_without_its_contract_is_refused(members, complaint):
    with pytest.raises(ValueError, match=complaint):
        objectives.register("test_made")(objective(**members))
    assert "test_made" not in objectives


def test_objective_may_ask_for_more_with_defaults():
    made = objective(loss=lambda self, net, batch, rng, extra=None, **rest: None)
    with objectives.temporary("test_made", made):
        assert objectives.get("test_made") is made


@pytest.mark.parametrize("keys", [None, "u", (), dict.keys])
def test_head_without_keys_is_refused(keys):
    with pytest.raises(ValueError, match="tuple of output names, such as keys"):
        heads.register("test_head")(type("Made", (), {"keys": keys}))


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({}, "needs_r = None; it needs needs_r: ClassVar = True if"),
        ({"needs_r": "yes"}, "needs_r = 'yes'"),
        ({"needs_r": True}, r"needs a method forward\(self, features, c, at\)"),
        (
            {"needs_r": True, "forward": lambda self, c: {}},
            r"it must accept forward\(self, features, c, at\)",
        ),
        ({"needs_r": True, "velocities": ("v",)}, r"velocities = \('v',\); .* \('energy',\)"),
        ({"needs_r": True, "velocities": "energy"}, "velocities = 'energy'; it must be a tuple"),
    ],
)
def test_head_without_its_contract_is_refused(members, complaint):
    with pytest.raises(ValueError, match=complaint):
        heads.register("test_head")(type("Made", (), {"keys": ("energy",), **members}))
    assert "test_head" not in heads


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({}, r"needs a method __call__\(self, raw, key, at\)"),
        ({"__call__": lambda self, raw, at: raw}, "it must accept __call__"),
        (
            {"__call__": lambda self, raw, key, at: raw, "inputs": lambda self, x, t: x},
            r"it must accept inputs\(self, at\)",
        ),
    ],
)
def test_parametrisation_without_its_contract_is_refused(members, complaint):
    made = type("Made", (), members)
    with pytest.raises(ValueError, match="is no dataclass; put @dataclass"):
        parametrisations.register("test_made")(made)
    with pytest.raises(ValueError, match=complaint):
        parametrisations.register("test_made")(dataclass(frozen=True)(made))
    assert "test_made" not in parametrisations


def test_sampler_without_nfe_is_refused():
    call = {"__call__": lambda self, net, x1, cond, rng: x1}
    with pytest.raises(ValueError, match="needs a field `nfe`"):
        samplers.register("test_sampler")(type("Made", (), call))


def test_sampler_with_another_call_is_refused():
    @dataclass(frozen=True)
    class Made:
        nfe: int = 1

        def __call__(self, net, x1):
            return x1

    with pytest.raises(ValueError, match=r"it must accept __call__\(self, net, x1, cond, rng\)"):
        samplers.register("test_sampler")(Made)
