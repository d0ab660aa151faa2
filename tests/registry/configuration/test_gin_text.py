"""Parts as objects, written as gin text and built again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gin
import numpy as np
import pytest

import benchmarks.builtin_parts  # noqa: F401  registers every part
import registry
from registry import gin_setup
from registry.configuration.gin_text import bindings_of_values
from trainers.engines import TorchEngine
from trainers.optim import AdamW
from zoo.objectives import DECM, DuMo, FlowMatching, MeanFlow
from zoo.paths import Linear, TrigFlow
from zoo.times import LogitNormalPair, UniformPair
from zoo.weighting import Adaptive


def built(key: str, value: Any) -> Any:
    """What gin makes of the text of a value."""
    gin_setup.parse([], bindings_of_values({key: value}))
    return gin_setup.build(key)


@pytest.mark.parametrize("name", registry.objectives.names())
def test_objective_with_its_defaults_is_one_line_and_comes_back(name):
    objective = registry.objectives.get(name)()
    assert bindings_of_values({"run.objective": objective}) == [f"run.objective = @{name}()"]
    assert built("run.objective", objective) == objective


@pytest.mark.parametrize(
    "objective",
    [
        MeanFlow(weight=Adaptive(power=0.5), times=LogitNormalPair(mean=-0.2), omega=0.3),
        DuMo(path=TrigFlow(), times=UniformPair(off_diagonal_fraction=0.25)),
        DECM(guidance_scale=1.5),
        FlowMatching(path=TrigFlow()),
    ],
    ids=["mean_flow", "dumo", "decm", "flow_matching"],
)
def test_objective_with_other_parts_comes_back(objective):
    assert built("run.objective", objective) == objective


def test_two_parts_of_one_class_that_differ_get_scopes_and_come_back():
    objective = DuMo(weight_v=Adaptive(power=0.25), weight_u=Adaptive(power=0.75))
    assert "dumo.weight_v = @dumo/weight_v/adaptive()" in bindings_of_values(
        {"run.objective": objective}
    )
    assert built("run.objective", objective) == objective


def test_a_part_that_was_given_leaves_others_of_its_class_at_their_defaults():
    """What is bound for one of two must not reach the other through gin."""
    mine, default = AdamW(lr=0.5, betas=(0.1, 0.2)), AdamW()
    both = {"run.optimizer": default, "run.teacher_optimizer": mine}
    gin_setup.parse([], bindings_of_values(both))
    assert gin_setup.build("run.optimizer") == default
    assert gin_setup.build("run.teacher_optimizer") == mine


@pytest.mark.parametrize("name", registry.objectives.names())
def test_instance_beside_a_file_comes_back_whatever_the_file_binds(name):
    objective = registry.objectives.get(name)()
    written = bindings_of_values({"run.objective": objective}, beside_file=True)
    gin_setup.parse([], ["adaptive.power = 0.125", "logit_normal_pair.mean = 3.0", *written])
    assert gin_setup.build("run.objective") == objective


def test_other_bindings_of_its_class_do_not_change_an_instance():
    mine = {"run.optimizer": AdamW(), "adamw.lr": 0.125}
    gin_setup.parse([], bindings_of_values(mine))
    assert gin_setup.build("run.optimizer") == AdamW()


def test_parts_of_one_class_under_two_arms_or_two_parts_stay_apart():
    values = {
        "a/run.objective": MeanFlow(omega=0.25), "b/run.objective": MeanFlow(omega=0.75),
        "dumo.times": UniformPair(off_diagonal_fraction=0.25),
        "mean_flow.times": UniformPair(off_diagonal_fraction=0.75),
    }  # fmt: skip
    gin_setup.parse([], bindings_of_values(values))
    assert [gin_setup.build(key) for key in values] == list(values.values())


def test_instance_of_a_class_that_was_defined_again_is_refused():
    def defined() -> type:
        @dataclass(frozen=True)
        class Mine:
            heads = ("v",)

            def loss(self, net, batch, rng): ...

        return Mine

    old, new = defined(), defined()
    with (
        registry.objectives.temporary("mine", new),
        pytest.raises(ValueError, match="older than the class that is registered as 'mine'"),
    ):
        bindings_of_values({"run.objective": old()})


@pytest.mark.parametrize("key", ["run.steps ", "run.steps = 3\nrun.seed", "", 3, "a b.c"])
def test_key_that_is_no_name_is_refused(key):
    with pytest.raises(ValueError, match="is not the name of a binding"):
        bindings_of_values({key: 1})


@pytest.mark.parametrize("text", ["@dumo()\nrun.steps = 9", "@", "% of it", "@dumo(power=1)"])
def test_text_that_only_begins_like_a_reference_is_refused(text):
    with pytest.raises(ValueError, match="begins like a gin reference"):
        bindings_of_values({"run.objective": text})


@pytest.mark.parametrize("values", [["run.steps = 5"], "run.steps = 5"])
def test_bindings_that_are_no_dict_are_refused(values):
    with pytest.raises(ValueError, match="must be a dict"):
        bindings_of_values(values)


def test_engines_that_have_no_equality_are_compared_by_their_fields():
    engine = TorchEngine(precision="bf16")
    assert bindings_of_values({"run.engine": engine}) == [
        "run.engine = @torch_engine()",
        "torch_engine.precision = 'bf16'",
    ]
    assert bindings_of_values({"run.engine": TorchEngine()}) == ["run.engine = @torch_engine()"]


def test_plain_data_and_references_are_written_as_they_are():
    values = {
        "run.steps": 10, "run.nfe": (1,), "run.ema_decay": np.float64(0.5), "run.start_from": "a'b",
        "run.seed": np.int64(3), "adamw.lr": np.float32(0.5),
        "run.backbone": "@dit", "run.power_emas": [], "dumo.path": Linear,
    }  # fmt: skip
    assert bindings_of_values(values) == [
        "run.steps = 10",
        "run.nfe = (1,)",
        "run.ema_decay = 0.5",
        'run.start_from = "a\'b"',
        "run.seed = 3",
        "adamw.lr = 0.5",
        "run.backbone = @dit",
        "run.power_emas = []",
        "dumo.path = @linear",
    ]


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}, lambda x: x])
def test_what_gin_cannot_write_is_refused_with_its_key(value):
    with pytest.raises(ValueError, match=r"run\.seed = .*cannot be written as gin text"):
        bindings_of_values({"run.seed": value})


def test_class_that_is_not_registered_is_refused_with_the_decorator():
    @dataclass(frozen=True)
    class Mine:
        power: float = 1.0

    with pytest.raises(ValueError, match=r"Mine is not registered.*register"):
        bindings_of_values({"run.objective": Mine()})


def test_change_of_one_field_changes_the_text():
    """The control: equal texts would hide a setting."""
    plain = MeanFlow()
    for name, value in (("omega", 0.7), ("weight", Adaptive(power=0.1)), ("path", TrigFlow())):
        changed = replace(plain, **{name: value})
        assert bindings_of_values({"k.x": changed}) != bindings_of_values({"k.x": plain})


def test_isolated_hides_bindings_and_puts_them_back():
    gin_setup.parse([], ["adamw.lr = 0.25"])
    with gin_setup.isolated():
        assert registry.optimizers.build("adamw") == AdamW()
        gin_setup.parse([], ["adamw.lr = 0.75"])
        assert registry.optimizers.build("adamw").lr == 0.75
    assert registry.optimizers.build("adamw").lr == 0.25
    with pytest.raises(RuntimeError, match="stop"), gin_setup.isolated():
        raise RuntimeError("stop")
    assert registry.optimizers.build("adamw").lr == 0.25


def test_isolated_leaves_the_callers_scope_and_lock_as_they_were():
    gin_setup.parse([], ["adamw.lr = 0.25"])
    gin.finalize()
    with gin.config_scope("mine"):
        with gin_setup.isolated():
            assert gin.current_scope() == []
            gin_setup.parse([], ["adamw.lr = 0.75"])
        assert gin.current_scope() == ["mine"]
    assert gin.config_is_locked()
