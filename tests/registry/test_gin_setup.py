"""gin files: where they are found, what a mistake in them says, what took effect."""

from __future__ import annotations

import re
import shlex
import textwrap

import gin
import pytest
from gin_toys import job, run

from registry import gin_setup, weights
from registry.configuration.gin_errors import message_of

pytestmark = pytest.mark.usefixtures("parts")


# Parsing


def test_bindings_win_over_files_and_later_files_over_earlier(write):
    one, two = write("1.gin", "job.seed = 1\njob.steps = 1"), write("2.gin", "job.seed = 2")
    gin_setup.parse([one, two])
    assert run()[1:] == (2, 1)
    gin_setup.parse([one, two], ["job.seed = 3"])
    assert run()[1:] == (3, 1)


def test_parse_starts_afresh(write):
    gin_setup.parse([], ["job.seed = 1", "SEEDS = [0]", "job.shape = %SEEDS"])
    run()
    gin_setup.parse([], ["job.steps = 2"])
    assert run()[1:] == (0, 2)
    assert "seed = 1" not in gin_setup.operative_text()
    assert "SEEDS" not in gin_setup.full_text()


def test_failed_parse_leaves_a_working_gin(write):
    readers = list(gin.config._FILE_READERS)
    with pytest.raises(ValueError):
        gin_setup.parse([write("a.gin", "job.seeed = 1")])
    assert gin.config._FILE_READERS == readers
    gin_setup.parse([], ["job.seed = 5"])
    assert run()[1] == 5


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("test_adaptve.power = 1", "no part named 'test_adaptve'. Did you mean 'test_adaptive'?"),
        ("job.objective = @test_mean()", "no part named 'test_mean'. Did you mean 'test_mean_flow"),
        ("job.objective = @a/test_mean()", "no part named 'test_mean'. Did you mean"),
        ("test_adaptive.powr = 1", "test_adaptive has no parameter 'powr'. Did you mean 'power'?"),
        ("a/test_adaptive.x = 1", "test_adaptive has no parameter 'x'. It has: power, floor."),
        ("job.objective = mean_flow", r"A text needs quotes \('mean_flow'\), a part an @"),
        ("job.seed 3", "this is not gin: .*job.seed 3"),
        ("job.seed = [1, 2", "bracket"),
        ("import no_such_module", "No module named 'no_such_module'.*next to it"),
    ],
)
def test_mistake_is_explained_with_its_place(write, line, complaint):
    file = write("wrong.gin", f"job.seed = 1\n{line}\n")
    with pytest.raises((ValueError, ModuleNotFoundError), match=f"(?s){complaint}") as error:
        gin_setup.parse([file])
    assert str(file) in str(error.value)
    assert type(error.value) in (ValueError, ModuleNotFoundError)


def test_mistake_in_a_binding_shows_the_binding():
    with pytest.raises(ValueError, match=r"(?s)no parameter 'powr'.*test_adaptive.powr = 1"):
        gin_setup.parse([], ["job.seed = 1", "test_adaptive.powr = 1"])
    with pytest.raises(ValueError, match=r"(?s)not gin.*In bindings, line 2: job.seed 3"):
        gin_setup.parse([], ["job.steps = 1", "job.seed 3"])


@pytest.mark.parametrize("binding", ["job.steps=/tmp/a b", "job.steps = ~/x", "job.steps = ../x"])
def test_a_path_without_quotes_is_shown_with_them_as_a_shell_takes_it(binding):
    with pytest.raises(ValueError, match="A text needs quotes") as error:
        gin_setup.parse([], [binding])
    (word,) = re.findall(r"--set (.*)", str(error.value))
    gin_setup.parse([], shlex.split(word))
    assert gin_setup.query("job.steps") == binding.split("=")[1].strip()


def test_an_error_of_a_part_has_no_addresses_of_python():
    class Grumpy:
        def __init__(self):
            raise TypeError(f"no good: {test_an_error_of_a_part_has_no_addresses_of_python}")

    with weights.temporary("grumpy", Grumpy):
        gin_setup.parse([], ["a/job.seed = @grumpy()"])
        with pytest.raises(TypeError) as error:
            gin_setup.build("job.seed", "a")
    text = message_of(error.value)
    assert "no good: function test_an_error" in text
    assert "while 'grumpy' was built in a" in text
    assert " at 0x" not in text


def test_a_macro_in_a_list_that_is_not_set_is_named():
    gin_setup.parse([], ["job.steps = [1, %NOPE]"], [])
    with pytest.raises(ValueError, match="macro %NOPE is read, and it is not set"):
        gin_setup.query("job.steps")


# Macros


def test_macro_that_is_not_set_is_named_before_the_run(write):
    file = write("a.gin", "STEPS = 10\njob.steps = %STEPS\njob.seed = %SEDE")
    with pytest.raises(ValueError, match=r"job.seed reads the macro %SEDE, which is not set"):
        gin_setup.parse([file])
    gin_setup.parse([file], ["SEDE = 7"])
    assert run()[1:] == (7, 10)


def test_macro_inside_a_structure_is_checked_too():
    with pytest.raises(ValueError, match="macro %LOST"):
        gin_setup.parse([], ["job.shape = {'a': [1, (%LOST, 2)]}"])


def test_macro_set_by_hand_must_be_read_by_something(write):
    file = write("a.gin", "STEPS = 10\nUNUSED = 1\njob.steps = %STEPS")
    gin_setup.parse([file])
    with pytest.raises(ValueError, match="nothing reads the macro 'STEP'.*Did you mean 'STEPS'"):
        gin_setup.parse([file], ["STEP = 5"])


def test_macro_of_an_arm_is_refused(write):
    file = write("a.gin", "STEPS = 1\na/STEPS = 2\njob.steps = %STEPS")
    with pytest.raises(ValueError, match=r"'a/STEPS'. Macros know no arms; bind the parameter"):
        gin_setup.parse([file])


# Arms


ARMS = """
    test_mean_flow.weight = @test_adaptive()
    job.objective = @test_mean_flow()
    p0/test_adaptive.power = 0.0
    p2/test_adaptive.power = 2.0
    SEEDS = [0, 1]
    Grid:
      arms = ('plain', 'p0', 'p2')
      axes = {'job.seed': %SEEDS, 'test_mean_flow.weight': [@test_adaptive(), None]}
"""


def test_arm_applies_its_bindings_only(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    assert [run(a)[0].weight.power for a in ("", "plain", "p0", "p2")] == [1.0, 1.0, 0.0, 2.0]


def test_unknown_arm_lists_the_arms(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    with pytest.raises(ValueError, match=r"no arm named 'p'. .*Arms: plain, p0, p2"):
        run("p")
    gin_setup.parse([], ["job.seed = 0", "a/job.seed = 1", "a/job.steps = 1"])
    assert gin_setup.arms() == ("a",)
    gin_setup.parse([], ["job.seed = 1"])
    with pytest.raises(ValueError, match="these files have no arms"):
        run("a")


def test_query_keeps_references_and_replaces_macros(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    axes = gin_setup.query("Grid.axes")
    assert repr(axes) == ("{'job.seed': [0, 1], 'test_mean_flow.weight': [@test_adaptive(), None]}")
    assert gin_setup.query("p0/test_adaptive.power") == 0.0
    assert gin_setup.query("p0/test_adaptive.floor", 3) == 3
    assert gin_setup.query("not_registered.anything") is None


def test_scope_bindings_are_what_the_arm_changes(write):
    gin_setup.parse([write("grid.gin", ARMS)])
    assert gin_setup.scope_bindings("p0") == {"test_adaptive.power": "0.0"}
    assert gin_setup.scope_bindings("plain") == {}


def test_plain_binding_that_an_arm_overrides_is_known():
    gin_setup.parse([], ["job.seed = 1", "job.steps = 1", "a/job.seed = 2", "b/job.steps = 2"])
    assert gin_setup.overridden_bindings("a") == ("job.seed",)
    assert gin_setup.overridden_bindings("") == ()


def test_required_value_may_come_from_the_arm_or_from_above():
    bindings = ["job.steps = %gin.REQUIRED", "a/job.steps = 3"]
    gin_setup.parse([], bindings)
    assert run("a")[2] == 3
    with pytest.raises(ValueError, match="require a value for job.steps; add .* job.steps = "):
        run()
    gin_setup.parse([], [*bindings, "job.steps = 4"])
    assert run()[2] == 4


def test_required_macro_is_named_by_its_name():
    gin_setup.parse([], ["STEPS = %gin.REQUIRED", "job.steps = %STEPS"])
    with pytest.raises(ValueError, match="require a value for STEPS;"):
        run()


# What took effect


def inert(*bindings: str, name: str = "") -> tuple[str, ...]:
    gin_setup.parse([], bindings)
    run(name)
    return gin_setup.inert_bindings(name)


def test_used_bindings_are_not_inert():
    assert inert("job.objective = @test_mean_flow()", "test_mean_flow.ratio = 0.5") == ()


def test_binding_of_a_default_factory_is_inert_until_it_is_bound_by_reference():
    plain = ("job.objective = @test_mean_flow()", "test_adaptive.power = 0.0")
    assert inert(*plain) == ("test_adaptive.power",)
    assert inert(*plain, "test_mean_flow.weight = @test_adaptive()") == ()


def test_binding_that_the_caller_overrides_is_inert():
    gin_setup.parse([], ["job.shape = 3", "job.seed = 1"])
    gin.get_configurable(job)(shape=4)
    assert gin_setup.inert_bindings() == ("job.shape",)


def test_macros_are_not_counted_but_their_readers_are():
    assert inert("POWER = 2.0", "test_adaptive.power = %POWER") == ("test_adaptive.power",)


def test_arm_is_judged_by_its_own_and_the_plain_bindings(write):
    gin_setup.parse([write("grid.gin", ARMS)], ["p0/job.sted = 1".replace("sted", "seed")])
    run("p0")
    assert gin_setup.inert_bindings("p0") == ()
    gin_setup.parse([write("grid.gin", ARMS)], ["p0/job.objective = None"])
    run("p0")
    # The part is not built in this arm; the other arm's binding is not this arm's matter.
    assert gin_setup.inert_bindings("p0") == ("test_mean_flow.weight", "p0/test_adaptive.power")


def test_overridden_binding_is_not_inert():
    assert inert("job.seed = 1", "a/job.seed = 2", name="a") == ()


def test_binding_of_a_scope_that_nothing_enters_is_inert():
    assert inert("job.seed = 1", "a/job.seed = 2") == ("a/job.seed",)


def test_scoped_reference_uses_its_own_scope():
    bindings = ("job.objective = @soft/test_mean_flow()", "soft/test_mean_flow.ratio = 0.5")
    assert inert(*bindings) == ()
    assert inert(*bindings, "test_mean_flow.ratio = 0.75") == ()
    assert inert(*bindings, "a/test_mean_flow.ratio = 1.0", name="a") == ("a/test_mean_flow.ratio",)


# Texts


def test_texts_can_be_parsed_to_the_same_run(write):
    gin_setup.parse([write("grid.gin", ARMS)], ["p0/job.seed = 4"])
    before = run("p0")
    full, operative = gin_setup.full_text(), gin_setup.operative_text()
    for text in (full, operative):
        gin_setup.parse([write("again.gin", text)])
        assert run("p0") == before


def test_operative_text_has_defaults_and_omits_what_is_unused():
    gin_setup.parse([], ["job.objective = @test_mean_flow()", "test_adaptive.floor = 0.5"])
    run()
    assert "test_mean_flow.ratio = 0.25" in gin_setup.operative_text()
    assert "floor" not in gin_setup.operative_text()


def test_bindings_of_a_text_keep_values_as_text():
    text = """
        SEEDS = [0, 1]
        a/job.seed = 2
        job.objective = @test_mean_flow()
        no_such_part:
          shape = (1, {'k': @thing, 'm': %SEEDS})
          name = 'x'
    """
    assert gin_setup.bindings_of(textwrap.dedent(text)) == {
        "SEEDS": "[0, 1]",
        "a/job.seed": "2",
        "job.objective": "@test_mean_flow()",
        "no_such_part.shape": "(1, {'k': @thing, 'm': %SEEDS})",
        "no_such_part.name": "'x'",
    }


def test_function_of_gin_is_no_part(tmp_path):
    with pytest.raises(ValueError, match=r"@constant\(\): 'constant' is a function of gin"):
        gin_setup.parse([], ["job.objective = @constant()"])
