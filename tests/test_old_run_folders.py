"""Folders that version 0.1 wrote before parameters were renamed: every command still takes them.

`run_folder_0_1` is a grid of two cells, made by its tiny.gin. The cell of seed 0 is finished. That
of seed 1 was killed after its checkpoint of step 3 of 4; EXPECTED is what it came to where nothing
killed it. `teacher_folder_0_1` has the files of a run of flow matching that a student needs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import Done, entries, sets, zoo

from benchmarks.report.reading.recorded_runs import read_runs

FIXTURES = Path(__file__).parent / "fixtures"
GRID, TEACHER = FIXTURES / "run_folder_0_1", FIXTURES / "teacher_folder_0_1"
SEED_0, SEED_1 = "mean_flow_seed=0-4624d97f", "mean_flow_seed=1-fbe90001"
EXPECTED = {
    "nfe1/fd_pixels": 91.09672534155081,
    "nfe1/kid_pixels": 1.874029883882335,
    "nfe2/fd_pixels": 91.09672425552249,
    "nfe2/kid_pixels": 1.874029873435791,
    "fd_pixels_floor": 18.4975604330789,
    "kid_pixels_floor": 0.1273312277972405,
}
# They are equal to the last bit on the machine that made them; another processor may round sums
# otherwise. The last two steps move the first value by 3e-5 of itself, another seed by 8e-2.
TOLERANCE = 5e-6


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the grid's folder, under the name that its record has."""
    return Path(shutil.copytree(GRID, tmp_path / "old_runs"))


def grid(old: Path, *bindings: str, dry: bool = False) -> Done:
    words = ["--dry-run"] if dry else []
    return zoo("grid", old / "tiny.gin", "--out", old, *words, *sets(*bindings))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# The grid goes on


def test_grid_goes_on_from_the_checkpoint_to_the_values_of_a_run_that_nothing_killed(old):
    done = grid(old)
    assert done.status == 0, done.err
    assert f"{SEED_0}: finished already" in done.err
    assert sorted(path.name for path in old.glob("mean_flow*")) == [SEED_0, SEED_1]
    result = read(old / SEED_1 / "result.json")
    assert result["steps"] == 4
    for name, value in EXPECTED.items():
        assert result["values"][name] == pytest.approx(value, rel=TOLERANCE), name
    trained = [e["step"] for e in entries(old / SEED_1, "metrics") if "loss" in e["values"]]
    assert trained == [1, 2, 3, 4]  # none was done again

    # A report has cells of both versions in one row, which it splits where settings differ.
    runs = read_runs([old])
    assert runs.groups == ("mean_flow",)
    assert [cell.seed for cell in runs.cells] == [0, 1]


def test_former_and_present_names_ask_for_the_same_cells(old):
    text = (old / "tiny.gin").read_text()
    present = text.replace("accumulate", "gradient_accumulation_steps")
    (old / "tiny.gin").write_text(present.replace("clip", "max_grad_norm"))
    listed = grid(old, dry=True).out
    assert "4624d97f  mean_flow  [finished]" in listed
    assert "fbe90001  mean_flow  [half-done]" in listed


@pytest.mark.parametrize("binding", ["torch_engine.clip = 0.25", "run.batch_size = 4"])
def test_grid_with_another_setting_is_another_one(old, binding):
    listed = grid(old, binding, dry=True).out
    assert listed.count("[new]") == 2
    assert "finished]" not in listed
    assert "half-done]" not in listed


# What the commands do with a finished run


@pytest.mark.slow
def test_report_takes_an_old_folder(old, tmp_path):
    done = zoo("report", old, "--out", tmp_path / "report")
    assert done.status == 0, done.err
    assert "98.38" in (tmp_path / "report" / "report.md").read_text()


def test_sample_takes_an_old_folder(old, tmp_path):
    picture = tmp_path / "grid.png"
    done = zoo("sample", old / SEED_0, "--nfe", 1, 2, "--num", 4, "--out", picture)
    assert done.status == 0, done.err
    assert picture.stat().st_size > 0


def test_evaluate_gives_an_old_folder_the_values_that_it_had(old, tmp_path):
    options = ("--num", 64, "--metrics", "frechet", "--features", "pixels")
    done = zoo("evaluate", old / SEED_0, *options, "--out", tmp_path / "evaluation")
    assert done.status == 0, done.err
    now = read(tmp_path / "evaluation" / "evaluation.json")["values"]
    before = read(old / SEED_0 / "evaluation" / "evaluation.json")["values"]
    # Pixels of an evaluation have been in 0..255.
    assert now == pytest.approx({k: v / 127.5**2 for k, v in before.items()}, rel=TOLERANCE)


def test_export_takes_an_old_folder(old, tmp_path):
    done = zoo("export", old / SEED_0, "--out", tmp_path / "exported")
    assert done.status == 0, done.err
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    weights = load_file(old / SEED_0 / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(exported[name].equal(weights[name]) for name in weights)


def test_ema_reads_old_snapshots_under_both_names_of_its_option(old):
    folder = old / SEED_0
    made = folder / "ema_width_0.1.safetensors"
    snapshot = load_file(folder / "ema_snapshots" / "step_00000004" / "width_0.1.safetensors")
    for option in ("--sigma-rel", "--width"):
        done = zoo("ema", folder, option, 0.1)
        assert done.status == 0, done.err
        average = load_file(made)
        assert all(average[name].equal(snapshot[name]) for name in snapshot)
        made.unlink()


# What a later run does with an old one


def distilled(out: Path, *bindings: str) -> Done:
    student = ("Grid.arms = ('decm',)", "frozen.pretrain = 0.0", f"frozen.checkpoint = '{TEACHER}'")
    words = ("--arm", "decm", *sets(*student, *bindings), "--out", out)
    return zoo("run", GRID / "tiny.gin", *words)


def test_student_takes_an_old_run_as_its_teacher(tmp_path):
    done = distilled(tmp_path / "out")
    assert done.status == 0, done.err
    assert read(tmp_path / "out" / "decm" / "result.json")["steps"] == 4


def test_student_of_another_backbone_is_refused(tmp_path):
    done = distilled(tmp_path / "out", "dit.num_heads = 1")
    assert done.status == 2
    assert "dit.num_heads = 2 there, 1 here" in done.err
    assert not (tmp_path / "out").exists()


def compared(out: Path, *bindings: str) -> Done:
    """The comparison to which the run in `teacher_folder_0_1` belonged, once more."""
    asked = ("Grid.arms = ('flow_matching',)", "run.power_emas = ()", "run.ema_snapshots = 0")
    shutil.copytree(TEACHER, out / "flow_matching", dirs_exist_ok=True)
    (out / "grid.json").write_text("{}")
    words = ("--arm", "flow_matching", *sets(*asked, *bindings), "--out", out, "--resume")
    return zoo("run", GRID / "tiny.gin", *words)


def test_finished_run_is_known_again_and_kept_from_other_settings(tmp_path):
    done = compared(tmp_path / "same")
    assert "flow_matching: finished already" in done.err, done.err
    done = compared(tmp_path / "other", "torch_engine.clip = 0.25")
    assert done.status == 2
    assert "with other settings: torch_engine.max_grad_norm = 0.5, now 0.25." in done.err
