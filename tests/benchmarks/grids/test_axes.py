"""Which cells a grid has: counts, order and texts of the expansion; what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import benchmarks.builtin_parts  # noqa: F401  registers every part
from benchmarks.grids import axes
from benchmarks.grids.axes import Declared, vary
from registry import gin_setup

VALUES = st.lists(st.integers().map(str), min_size=1, max_size=4, unique=True)
KEYS = st.sampled_from(["run.seed", "ema.decay", "STEPS", "mean_flow.omega", "include"])
AXES = st.dictionaries(KEYS, VALUES, max_size=3)


@given(AXES)
def test_product_has_every_combination_once(varied):
    found = list(vary(varied, "product"))
    assert len(found) == len(set(found)) == math.prod(map(len, varied.values()))
    assert all(tuple(key for key, _ in setting) == tuple(varied) for setting in found)
    assert {pair for setting in found for pair in setting} == pairs(varied)


@given(AXES)
def test_one_at_a_time_is_the_base_and_each_value_alone(varied):
    found = list(vary(varied, "one_at_a_time"))
    assert found[0] == ()
    assert all(len(setting) == 1 for setting in found[1:])
    assert len(found) == len(set(found)) == 1 + sum(map(len, varied.values()))
    assert {pair for setting in found for pair in setting} == pairs(varied)


@given(st.integers(1, 4), st.lists(KEYS, min_size=1, unique=True))
def test_zip_moves_all_axes_together(length, keys):
    varied = {key: [f"{key}{i}" for i in range(length)] for key in keys}
    found = list(vary(varied, "zip"))
    assert found == [tuple((key, f"{key}{i}") for key in keys) for i in range(length)]


@given(AXES, AXES, st.lists(st.sampled_from("abcd"), min_size=1, unique=True))
def test_every_arm_runs_in_every_setting_one_repetition_after_the_other(varied, repeat, arms):
    for mode in ("product", "one_at_a_time"):
        cells = Declared(axes=varied, mode=mode, repeat=repeat).cells(arms)
        settings_ = list(vary(varied, mode))
        again = list(vary(repeat, "product"))
        whole = [(arm, setting) for arm in arms for setting in settings_]
        assert len(cells) == len(whole) * len(again)
        for number, one in enumerate(again):
            part = cells[number * len(whole) :][: len(whole)]
            assert part == [(arm, setting + one) for arm, setting in whole]


def pairs(varied):
    return {(key, value) for key, values in varied.items() for value in values}


def declared(text: str) -> Declared:
    gin_setup.parse([], [text])
    return axes.declared(Path.cwd())


def test_values_keep_their_gin_text():
    found = declared(
        "BIG = 3\nGrid.axes = {'run.a': [%BIG, 1e-05, 'text', (1, 2), None, True, @jvp(), @dit, "
        "@teacher/adamw()]}"
    )
    assert found.axes["run.a"] == [
        "3", "1e-05", "'text'", "(1, 2)", "None", "True", "@jvp()", "@dit", "@teacher/adamw()",
    ]  # fmt: skip
    for text in found.axes["run.a"]:  # each is gin again
        gin_setup.parse([], [f"A = {text}", "Grid.axes = {'b': [%A]}"])
        assert [repr(value) for value in gin_setup.query("Grid.axes")["b"]] == [text]


def test_a_setting_is_bound_in_the_scope_of_its_arm():
    setting = (
        ("run.seed", "1"),
        ("teacher/adamw.lr", "0.1"),
        ("STEPS", "10"),
        ("include", "'a.gin'"),
    )
    assert axes.bindings("dumo", setting) == (
        "dumo/run.seed = 1", "teacher/adamw.lr = 0.1", "STEPS = 10", "include 'a.gin'",
    )  # fmt: skip
    assert axes.bindings("", setting[:1]) == ("run.seed = 1",)


def test_files_of_an_axis_are_seen_from_the_folder_of_the_grid(tmp_path):
    (tmp_path / "mine.gin").write_text("run.seed = 3\n")
    gin_setup.parse([], ["Grid.axes = {'include': ['mine.gin', 'objective/dumo.gin']}"])
    mine, ours = axes.declared(tmp_path).axes["include"]
    assert mine == repr(str(tmp_path / "mine.gin"))
    assert ours.endswith("gin/objective/dumo.gin'")
    gin_setup.parse([], ["Grid.axes = {'include': ['gone.gin']}"])
    with pytest.raises(FileNotFoundError, match=r"gone.gin"):
        axes.declared(tmp_path)


def test_labels_are_short_but_tell_keys_apart():
    setting = (("dumo.derivative", "@jvp()"), ("ema.decay", "0.9"), ("run.name", "'a b'"))
    assert axes.label("dumo", setting) == "dumo derivative=jvp decay=0.9 name=a b"
    same = (("dumo.weight", "1"), ("decm.weight", "2"))
    assert axes.label("", same) == "dumo.weight=1 decm.weight=2"
    files = (("include", "'/home/me/big.gin'"),)
    assert axes.label("a", files) == "a include=big"
    assert axes.slug("mean_flow nfe=(1, 2) file=a/b") == "mean_flow_nfe=_1_2_file=a_b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Grid.axes = ['run.seed']", "must be a dict, such as"),
        ("Grid.axes = {'run.seed': 3}", "keys with lists of values"),
        ("Grid.axes = {'run.seed': []}", "keys with lists of values"),
        ("Grid.repeat = {'run.seed': 'abc'}", "Grid.repeat has 'run.seed': 'abc'"),
        ("Grid.axes = {3: [1]}", "keys with lists of values"),
        ("Grid.axes = {'run.seed': [0, 1, 0]}", "gives run.seed the value 0 more than once"),
        ("Grid.axes = {'include': [3]}", "takes names of gin files, not 3"),
        ("Grid.mode = 'prodcut'", "'prodcut' is none of product, zip, one_at_a_time"),
        ("Grid.mode = ['zip']", "Grid.mode = ['zip'] must be a text in quotes"),
        (
            "Grid.mode = 'zip'\nGrid.axes = {'a.b': [1, 2], 'a.c': [1]}",
            "equally many values: a.b has 2, a.c has 1",
        ),
        (
            "Grid.axes = {'run.seed': [0]}\nGrid.repeat = {'run.seed': [1]}",
            "run.seed is in Grid.axes and in Grid.repeat",
        ),
    ],
)
def test_axes_that_make_no_sense_are_refused(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        declared(text)


def test_kept_text_of_a_cell_has_no_axes():
    assert not declared("Grid.only = 'dumo'\nGrid.axes = {'run.seed': [0, 1]}")
    assert declared("Grid.axes = {'run.seed': [0, 1]}")


def test_zip_may_have_a_value_again_but_no_setting():
    gin_setup.parse([], ["Grid.axes = {'run.steps': [1, 1, 2], 'adamw.lr': [3, 4, 4]}"])
    with pytest.raises(ValueError, match="gives run.steps the value 1 more than once"):
        axes.declared(Path())
    gin_setup.parse([], [*_ZIP, "Grid.axes = {'run.steps': [1, 1, 2], 'adamw.lr': [3, 4, 4]}"])
    assert len(axes.declared(Path()).cells([""])) == 3
    gin_setup.parse([], [*_ZIP, "Grid.axes = {'run.steps': [1, 1], 'adamw.lr': [3, 3]}"])
    with pytest.raises(ValueError, match=r"has the setting steps=1 lr=3 more than once"):
        axes.declared(Path())


_ZIP = ["Grid.mode = 'zip'"]


@pytest.mark.parametrize("mode", axes.MODES)
@given(varied=AXES)
def test_settings_are_counted_without_making_them(mode, varied):
    if mode == "zip":
        varied = {key: list("ab") for key in varied}
    assert axes.num_settings(varied, mode) == len(list(vary(varied, mode)))


def test_a_grid_of_too_many_cells_is_refused_at_once_with_the_number():
    many = [str(i) for i in range(1000)]
    with pytest.raises(ValueError, match=r"1,000 cells .* Grid.max_cells = 999\."):
        Declared(axes={"mlp.dim": many}, max_cells=999).cells([""])
    huge = Declared(axes={"adamw.lr": many, "mlp.dim": many}, repeat={"run.seed": many})
    with pytest.raises(
        ValueError, match=r"2,000,000,000 cells .* Grid.max_cells = 10,000.*2000000000"
    ):
        huge.cells(["mean_flow", "dumo"])
    assert len(Declared(axes={"mlp.dim": many}, max_cells=1000).cells([""])) == 1000


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "True", "'10'"])
def test_the_limit_of_cells_is_a_whole_number(limit):
    with pytest.raises(ValueError, match=f"^Grid.max_cells = {limit} must be a whole number"):
        declared(f"Grid.max_cells = {limit}")
