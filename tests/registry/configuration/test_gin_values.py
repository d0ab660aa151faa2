"""What may be bound: the type, the range and the kind of every value, and that gin can write it."""

from __future__ import annotations

import pytest

import benchmarks.experiments.build  # noqa: F401  so that gin knows run
from registry import gin_setup, metrics
from registry.configuration.gin_text import bindings_of_values
from registry.configuration.gin_values import problems

REFUSED = {
    "run.steps = '10'": "Write run.steps = 10",
    "run.steps = True": "a whole number",
    "run.steps = 3.5": "a whole number",
    "run.steps = 36893488147419103232": "The largest is",
    "run.non_finite = 'ignore'": "'stop' or 'skip'",
    "run.checkpoint_seconds = 'often'": "a number",
    "run.checkpoint_seconds = -0.5": "of 0 or more",
    "run.optimizer = @mixture()": "an optimizer, such as @adamw()",
    "run.optimizer = 'adamw'": "an optimizer, such as @adamw()",
    "run.recorder = @cosine()": "@cosine is a schedule",
    "run.compile = 1": "True or False",
    "torch_engine.gradient_accumulation_steps = 2.0": "gradient_accumulation_steps = 2",
    "adamw.betas = (0.9,)": "a tuple of 2",
    "adamw.lr = @uniform()": "@uniform is a time law",
    "adamw.lr = 1j": "a number",
    "mlp.depth = -4": "a whole number of 1 or more",
    "unet.multipliers = (1, 0)": "a whole number of 1 or more",
    "dumo.label_dropout = 1.5": "a number from 0 to 1",
    "dumo.clip_by = 'row'": "'element' or 'rms'",
    "mean_flow.times = @digits()": "a time law",
    "feature_metrics.metrics = [@mixture()]": "something with against()",
    "feature_metrics.metrics = @mmd()": "(@mmd(),)",
    "mixture.means = ((0.0, 1.0), (2.0, 'a'))": "each is a number",
}
TAKEN = (
    "run.steps = 10",
    "run.images = None",
    "run.ema_decay = (0.9, 0.99)",
    "run.ema_decay = 0",
    "run.sampler = None",
    "run.optimizer = @radam()",
    "run.heads = [@velocity]",
    "adamw.betas = [0.9, 0.95]",
    "restart.t_min = None",
    "gaussian.std = (1, 2.0)",
    "dumo.label_dropout = 0",
    "image_folder.folder = 'a % b # c'",
)


@pytest.mark.parametrize("binding", REFUSED)
def test_a_value_that_the_parameter_does_not_take_is_refused_by_its_key(binding):
    with pytest.raises(ValueError) as error:
        gin_setup.parse([], [binding])
    assert str(error.value).startswith(f"{binding.split(' = ')[0]} = ")
    assert REFUSED[binding] in str(error.value)


@pytest.mark.parametrize("binding", TAKEN)
def test_a_value_that_the_parameter_takes_is_bound(binding):
    gin_setup.parse([], [binding])


@pytest.mark.parametrize("text", ["1e999", "-1e999", "(0.9, 1e999)", "{'a': [1e999]}", "%HUGE"])
def test_a_number_that_gin_cannot_write_is_refused(text):
    with pytest.raises(ValueError, match=r"adamw\.lr = .*inf.*gin has no text"):
        gin_setup.parse([], ["HUGE = 1e999", "run.seconds = %HUGE", f"adamw.lr = {text}"])


def test_what_is_wrong_with_several_bindings_is_said_at_once():
    troubles = []
    gin_setup.parse([], ["run.steps = '10'", "adamw.lr = 1e999", "mlp.dim = 0"], troubles)
    assert [trouble.split(" = ")[0] for trouble in troubles] == ["run.steps", "adamw.lr", "mlp.dim"]


def test_an_annotation_that_only_a_checker_can_resolve_is_not_checked():
    class Mine:
        """A metric of a file that imports a name for its annotations alone."""

        def __init__(self, scale: NotThere = 1):  # noqa: F821
            self.scale = scale

        def __call__(self, samples, reference):
            yield "mine", self.scale

    with metrics.temporary("mine_unresolved", Mine):
        gin_setup.parse([], ["mine_unresolved.scale = 'text'"])


def test_a_parameter_whose_default_is_none_takes_none():
    class Mine:
        """A metric with an implicit None."""

        def __init__(self, scale: float = None):  # noqa: RUF013
            self.scale = scale

        def __call__(self, samples, reference):
            yield "mine", 0.0

    with metrics.temporary("mine_none", Mine):
        gin_setup.parse([], ["mine_none.scale = None"])
        with pytest.raises(ValueError, match=r"mine_none\.scale = 'a' must be a number"):
            gin_setup.parse([], ["mine_none.scale = 'a'"])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), {1, 2}, object(), lambda: 0])
def test_the_python_door_refuses_what_gin_cannot_write(value):
    with pytest.raises(ValueError, match=r"adamw\.lr"):
        bindings_of_values({"adamw.lr": value})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "that is not finite"),
        ((0.9, float("nan")), "that is not finite"),
        ({1, 2}, "cannot be written"),
        ([object()], "cannot be written"),
    ],
)
def test_a_value_that_imported_code_binds_is_one_that_gin_can_write(value, said):
    (problem,) = problems([("adamw.lr", "adamw", "lr", value)])
    assert problem.text.startswith("adamw.lr = ")
    assert said in problem.text
