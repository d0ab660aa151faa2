"""Planning a grid: what is built, merged, named and refused before anything trains."""

from __future__ import annotations

import gc
import json
import shlex
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import DIGITS, FILE_ONLY

from benchmarks.grids.cells import Plan, plan
from benchmarks.grids.request import Request

BASE = """
include 'experiments/mixture.gin'
mlp.dim = 8
mlp.depth = 1
STEPS = 4
run.num_samples = 12
run.recorder = @jsonl()
"""


@pytest.fixture
def planned(tmp_path):
    """Plans a grid of this gin text after the small mixture."""

    def planned(text: str, *bindings: str, base: str = BASE, **how) -> Plan:
        file = tmp_path / "mine.gin"
        file.write_text(base + text)
        request = Request(file=file, bindings=bindings)
        return plan(request, request.axes(), **how)

    return planned


def groups(found: Plan) -> list[str]:
    return [one.group for one in found.cells]


def ids(found: Plan) -> list[str]:
    return [one.cell.id for one in found.cells]


FM = "Grid.arms = ('flow_matching',)\n"
ONE = "Grid.arms = ('mean_flow',)\n"
TWO = "Grid.arms = ('flow_matching', 'mean_flow')\n"


def test_an_axis_without_effect_in_an_arm_is_left_out_there_and_said(planned):
    found = planned(TWO + "Grid.axes = {'logit_normal_pair.std': [1.0, 2.0], 'run.seed': [0, 1]}\n")
    assert groups(found) == ["flow_matching"] * 2 + [
        "mean_flow std=1.0", "mean_flow std=1.0", "mean_flow std=2.0", "mean_flow std=2.0",
    ]  # fmt: skip
    assert len(set(ids(found))) == 6
    assert found.notes == (
        "logit_normal_pair.std has no effect in 4 cells of flow_matching: left out there",
        "of 8 cells 6 are different; the others are merged",
    )
    assert found.cells[0].bindings == ("flow_matching/run.seed = 0",)
    assert found.cells[2].bindings == (
        "mean_flow/logit_normal_pair.std = 1.0",
        "mean_flow/run.seed = 0",
    )


def test_an_axis_may_have_an_effect_beside_some_values_of_another_only(planned):
    found = planned(
        ONE + "Grid.axes = {'mean_flow.weight': [@unweighted(), @adaptive()], "
        "'adaptive.power': [0.5, 1.0]}\n"
    )
    assert groups(found) == [
        "mean_flow weight=unweighted",
        "mean_flow weight=adaptive power=0.5",
        "mean_flow weight=adaptive power=1.0",
    ]


def test_a_value_that_is_the_files_own_is_merged_with_the_base(planned):
    found = planned(
        FM + "adamw.lr = 2e-3\nGrid.mode = 'one_at_a_time'\n"
        "Grid.axes = {'adamw.lr': [1e-3, 2e-3], 'run.ema_decay': [0.9]}\n"
        "Grid.repeat = {'run.seed': [0, 1]}\n"
    )
    assert groups(found) == [
        "flow_matching", "flow_matching lr=0.001", "flow_matching ema_decay=0.9",
    ] * 2  # fmt: skip


def test_an_axis_without_effect_anywhere_is_an_error(planned):
    with pytest.raises(ValueError, match="nothing uses pseudo_huber.c"):
        planned(TWO + "Grid.axes = {'pseudo_huber.c': [0.1, 0.2]}\n")
    with pytest.raises(ValueError, match=r"nothing uses decm.lam, exact.derivative"):
        planned(TWO + "decm.lam = 0.3\nGrid.axes = {'exact.derivative': [@dual(), @jvp()]}\n")
    with pytest.raises(ValueError, match=r"nothing reads the macro 'STEP'"):
        planned(TWO + "Grid.axes = {'STEP': [3, 4]}\n")


def test_macros_files_and_keys_of_one_arm_are_axes_too(planned, tmp_path):
    (tmp_path / "slow.gin").write_text("adamw.lr = 1e-5\n")
    (tmp_path / "same.gin").write_text("shortcut.num_steps = 4\n")
    found = planned(
        TWO + "Grid.mode = 'one_at_a_time'\nGrid.axes = {'include': ['slow.gin', 'same.gin'], "
        "'STEPS': [2, 3], 'mean_flow/adamw.lr': [0.5]}\n"
    )
    assert groups(found) == [
        "flow_matching", "flow_matching include=slow", "flow_matching STEPS=2",
        "flow_matching STEPS=3", "mean_flow", "mean_flow include=slow", "mean_flow STEPS=2",
        "mean_flow STEPS=3", "mean_flow lr=0.5",
    ]  # fmt: skip


def test_a_macro_that_is_the_seed_is_no_part_of_the_group(planned):
    found = planned(FM + "SEED = 3\nrun.seed = %SEED\nGrid.axes = {'SEED': [4, 5]}\n")
    assert groups(found) == ["flow_matching"] * 2
    assert len({one.cell.name for one in found.cells}) == 2


def test_axes_without_arms_vary_the_run_itself(planned):
    found = planned("run.objective = @mean_flow()\nGrid.axes = {'run.seed': [0, 1]}\n")
    assert [(one.cell.tags["arm"], one.bindings) for one in found.cells] == [
        ("mean_flow", ("run.seed = 0",)),
        ("mean_flow", ("run.seed = 1",)),
    ]


# Ids


SEEDS = "Grid.axes = {'run.seed': [0, 1]}\n"
SEED = "Grid.axes = {'run.seed': [0]}\n"


@pytest.mark.parametrize(
    "same",
    [
        "# a comment\n" + SEED + FM,
        "mlp.max_frequency = 8.0\n" + FM + SEED,  # the default, spelled out
        "DIM = 8\nmlp.dim = %DIM\n" + FM + SEED,
        "objective.flow_matching.label_dropout = 0.1\n" + FM + SEED,
        "run.checkpoint_seconds = 3.0\n" + FM + SEED,
        "run.recorder = @mlflow()\nmlflow.experiment = 'mine'\n" + FM + SEED,
        "Grid.launcher = @subprocesses()\nsubprocesses.workers = 3\n" + FM + SEED,
        "shortcut.num_steps = 64\n" + FM.replace(",)", ", 'shortcut')") + SEED,
    ],
)
def test_id_does_not_change_with_what_does_not_count(planned, same):
    before = ids(planned(FM + SEED))
    assert ids(planned(same))[:1] == before


def test_id_does_not_change_with_the_pruner(planned):
    text = "run.evaluate_every = 2\n" + FM + SEED
    before = ids(planned(text))
    pruner = "run.pruner = @successive_halving()\nsuccessive_halving.min_steps = 2\n"
    found = planned(pruner + "successive_halving.metric = 'nfe1/mmd_pixels'\n" + text)
    assert (ids(found), found.cells[0].prunes) == (before, True)


@pytest.mark.parametrize(
    "other",
    [
        "flow_matching.label_dropout = 0.2\n",
        "run.batch_size = 255\n",
        "STEPS = 5\n",
        "run.nfe = (1, 2)\n",
        "mixture.weights = (0.1, 0.5, 0.25, 0.15)\n",
        "adamw.lr = 1e-4\n",
    ],
)
def test_id_changes_with_every_value_that_takes_effect(planned, other):
    before = ids(planned(FM + SEED))
    after = ids(planned(other + FM + SEED))
    assert len({*before, *after}) == 2


def test_id_depends_on_the_version_and_on_imported_code_but_not_on_its_comments(
    planned, tmp_path, monkeypatch
):
    code = tmp_path / "my_code.py"
    code.write_text("scale = 1.0\n")
    text = "import my_code\n" + FM + SEED
    before = ids(planned(text))
    code.write_text("# why\nscale  =  1.0\n")
    assert ids(planned(text)) == before
    code.write_text("scale = 2.0\n")
    changed = ids(planned(text))
    monkeypatch.setattr("benchmarks.grids.cells.version_of", lambda name: "9.9")
    assert len({*before, *changed, *ids(planned(text))}) == 3


def test_the_command_of_a_cell_asks_for_that_cell(planned, tmp_path):
    (tmp_path / "slow.gin").write_text("adamw.lr = 1e-5\n")
    found = planned(
        TWO + "Grid.mode = 'one_at_a_time'\n"
        "Grid.axes = {'mean_flow.derivative': [@jvp()], 'include': ['slow.gin']}\n",
        "run.batch_size = 32",
    )
    assert len(found.cells) == 5
    for one in found.cells:
        words = shlex.split(one.cell.tags["cell.command"])
        assert words[:3] == ["objective-zoo", "run", str(tmp_path / "mine.gin")]
        arm = words[words.index("--arm") + 1]
        bindings = [b for word, b in pairwise(words) if word == "--set"]
        assert bindings == ["run.batch_size = 32", *json.loads(one.cell.tags["cell.bindings"])]
        request = Request(file=Path(words[2]), bindings=tuple(bindings), only=(arm,))
        (alone,) = plan(request, type(found.axes)()).cells
        assert alone.cell.id == one.cell.id


def test_the_command_of_a_cell_has_whole_paths(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for shade in range(4):
            Image.new("L", (8, 8), 60 * shade).save(tmp_path / name / f"{shade}.png")
    found = planned(
        "Grid.arms = ('mean_flow',)\nGrid.axes = {'image_folder.folder': ['a', 'b']}\n",
        *(*FILE_ONLY, "run.dataset = @image_folder()", "image_folder.resolution = 8"),
        base=f"include '{DIGITS}'\n",
    )
    for one, name in zip(found.cells, ("a", "b"), strict=True):
        words = shlex.split(one.cell.tags["cell.command"])
        assert f"mean_flow/image_folder.folder = '{tmp_path / name}'" in words


# What is refused


def test_troubles_of_all_cells_come_together_with_the_cells_named(planned, tmp_path):
    with pytest.raises(ValueError) as error:
        planned(
            "Grid.arms = ('flow_matching', 'mean_flow', 'dumo')\n"
            "dumo/run.dataset = @image_folder()\n"
            f"dumo/image_folder.folder = '{tmp_path / 'nowhere'}'\n"
            "Grid.axes = {'run.sampler': [@flow_map()], 'mlp.depht': [1]}\n"
            "Grid.mode = 'one_at_a_time'\nGrid.repeat = {'run.seed': [0, 1]}\n"
            "mean_flow/run.stpes = 3\ndumo/dumo.residual = @exakt()\n"
        )
    said = str(error.value).splitlines()
    assert any(
        line.startswith("flow_matching sampler=flow_map seed=0 and 1 more: objective")
        for line in said
    )
    assert any(
        "depht=1 seed=0 and 1 more" in line and "Did you mean 'depth'" in line for line in said
    )
    assert any(line.startswith("mean_flow/run.stpes: ") and "'steps'" in line for line in said)
    assert any(line.startswith("dumo/dumo.residual: ") and "'exact'" in line for line in said)
    assert any(line.startswith("dumo seed=0 and 3 more") and "nowhere" in line for line in said)


def test_setting_what_an_axis_binds_is_refused(planned):
    with pytest.raises(ValueError, match=r"run.seed has no effect: the file's axis run.seed"):
        planned(FM + SEEDS, "run.seed = 5")
    assert len(planned(FM + SEEDS, "Grid.axes = {'run.seed': [7]}").cells) == 1


def test_networks_are_dropped_once_checked(planned):
    nets = []
    planned(FM + SEEDS, cost_of=lambda experiment: nets.append(weakref.ref(experiment.net)))
    gc.collect()
    assert [net() for net in nets] == [None, None]


@pytest.mark.parametrize("axis", ["torch_engine.clip", "torch_engine.max_grad_norm"])
def test_cells_keep_id_and_folder_whichever_name_of_a_parameter_an_axis_uses(planned, axis):
    """A grid that was begun under the former name goes on under the present one."""
    engine = "run.engine = @torch_engine()\n"
    former = planned(FM + engine + "Grid.axes = {'torch_engine.clip': [0.5, 1.0]}\n")
    found = planned(FM + engine + f"Grid.axes = {{'{axis}': [0.5, 1.0]}}\n")
    assert ids(found) == ids(former)
    assert [one.cell.name for one in found.cells] == [
        f"flow_matching_clip={value}-{one.cell.id[:8]}"
        for value, one in zip(("0.5", "1.0"), former.cells, strict=True)
    ]
