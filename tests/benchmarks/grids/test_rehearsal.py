"""A rehearsal finds what would end a run after its training, and leaves no trace."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.data.mixtures import Mixture
from benchmarks.grids import comparison
from benchmarks.grids import rehearsal as of_cells
from benchmarks.grids.axes import Declared
from benchmarks.grids.cells import plan
from benchmarks.grids.comparison import compare, run_grid
from benchmarks.grids.dry_run import dry_run
from benchmarks.grids.rehearsal import rehearse
from benchmarks.grids.request import Request
from benchmarks.launchers.launcher import InProcess
from benchmarks.planning.rehearsal import rehearse_here
from benchmarks.records.open_run import OpenRun
from benchmarks.records.recorders import Jsonl
from benchmarks.runs import rehearsal
from registry import datasets, gin_setup, metrics, objectives, recorders, samplers, schedules
from trainers.optim import Cosine
from zoo.objectives.flow_matching import FlowMatching
from zoo.samplers.methods import Euler

FLAT = """
run.objective = @flow_matching()
run.dataset = @gaussian()
run.backbone = @mlp
mlp.dim = 8
mlp.depth = 1
run.batch_size = 8
run.steps = 3
run.num_samples = 8
run.nfe = (1,)
run.recorder = @jsonl()
run.device = 'cpu'
"""
# The same in space, where no picture is drawn; not for tests that bind another data set.
TINY = FLAT + "gaussian.mean = (0.6, -0.8, 0.1)\ngaussian.std = (0.6, 0.3, 0.5)\n"
TOO_FEW = ("run.metric = @mmd()", "run.num_samples = 1")


@pytest.fixture
def request_of(tmp_path):
    def made(*bindings, text=TINY):
        file = tmp_path / "tiny.gin"
        file.write_text(text)
        return Request(file=file, bindings=bindings)

    return made


def refusal(request):
    """What the rehearsal of the request says."""
    planned = plan(request, Declared())
    with pytest.raises(ValueError) as error:
        rehearse(planned.cells, request.file.parent / "out", planned.launcher)
    assert not (request.file.parent / "out").exists()
    return str(error.value)


def metric_that(gives):
    class Mine:
        """A metric of a user."""

        better = "lower"

        def __call__(self, samples, reference):
            return gives(samples, reference)

    return Mine


METRICS = {
    "a tensor of several": (lambda s, r: [("a", s.mean(0))], "each value must be one number"),
    "a text": (lambda s, r: [("a", "good")], "each value must be one number"),
    "three things": (lambda s, r: [("a", 1.0, 2.0)], "pairs of a name and a number"),
    "a dict": (lambda s, r: {"a": 1.0}, "gave dict"),
    "nothing": (lambda s, r: None, "gave NoneType"),
    "a name twice": (lambda s, r: [("a", 1.0), ("a", 2.0)], "twice"),
    "nan of real data": (lambda s, r: [("a", float("nan"))], "gives nan for a"),
    "an error": (lambda s, r: 1 / 0, "ZeroDivisionError"),
    "an end of the process": (lambda s, r: exit("enough"), "enough"),
}


@pytest.mark.parametrize("case", METRICS)
def test_a_metric_that_breaks_its_contract_is_found(request_of, case):
    gives, said = METRICS[case]
    with metrics.temporary("mine_metric", metric_that(gives)):
        found = refusal(request_of("run.metric = @mine_metric()"))
    assert said in found
    assert "flow_matching: " in found


def test_a_tensor_of_one_number_is_a_number(request_of, tmp_path):
    mine = metric_that(lambda samples, reference: [("spread", samples.std())])
    with metrics.temporary("mine_metric", mine):
        compare(request_of("run.metric = @mine_metric()"), tmp_path / "out")
    assert (tmp_path / "out" / "flow_matching" / "result.json").exists()


def test_too_few_samples_are_found_and_few_rows_of_the_rehearsal_are_not(request_of, tmp_path):
    assert "run.num_samples = 1" in refusal(request_of(*TOO_FEW))

    def needs(samples, reference):
        if len(samples) < 40:
            raise ValueError("fewer than 40")
        yield "needs_40", 0.0

    with metrics.temporary("mine_metric", metric_that(needs)):
        assert "fewer than 40" in refusal(request_of("run.metric = @mine_metric()"))
        enough = request_of("run.metric = @mine_metric()", "run.num_samples = 40")
        planned = plan(enough, Declared())
        rehearse(planned.cells, tmp_path / "out", planned.launcher)


def test_a_sampler_of_another_shape_is_found(request_of):
    class Wide(Euler):
        """Gives each coordinate twice."""

        def __call__(self, net, x1, cond, rng):
            return torch.cat([x1, x1], 1)

    class Mine(FlowMatching):
        """Flow matching that takes any sampler of its output."""

        samplers = None

    with samplers.temporary("wide", Wide), objectives.temporary("mine_objective", Mine):
        found = refusal(request_of("run.objective = @mine_objective()", "run.sampler = @wide()"))
    assert "shape of its noise" in found


def test_a_schedule_that_fails_at_the_last_step_is_found(request_of):
    class Late(Cosine):
        """Divides by what is left."""

        def __call__(self, step, progress):
            return 1.0 if progress < 1 else float("nan")

    with schedules.temporary("late", Late):
        found = refusal(request_of("run.schedule = @late()"))
    assert "run.schedule = @late() gives nan at step 3" in found


def test_a_recorder_that_fails_late_is_found(request_of):
    class Fails(OpenRun):
        def artifact(self, path):
            if Path(path).suffix == ".json":
                raise RuntimeError("no room for files")
            super().artifact(path)

    class Mine(Jsonl):
        """A recorder of a user."""

        def start(self, name, folder, parent=None, tags=None):
            return Fails(name, Path(folder), parent, tags or {})

    with recorders.temporary("mine_recorder", Mine):
        assert "no room for files" in refusal(request_of("run.recorder = @mine_recorder()"))


def test_a_reference_of_another_shape_is_found(request_of):
    class Odd(Mixture):
        """Its reference has a coordinate more."""

        def reference(self, n, seed):
            x, cond = super().reference(n, seed)
            return (x if n <= 4 else torch.cat([x, x[:, :1]], 1)), cond

    with datasets.temporary("odd", Odd):
        assert refusal(request_of("run.dataset = @odd()", text=FLAT))


def test_the_error_names_each_cell_once_for_all_that_fail(request_of):
    text = "".join(
        f"{arm}/run.objective = @{arm}()\n" for arm in ("flow_matching", "mean_flow")
    ) + TINY.replace("run.objective = @flow_matching()\n", "")
    arms = request_of("Grid.arms = ('flow_matching', 'mean_flow')", *TOO_FEW, text=text)
    found = refusal(arms)
    assert "flow_matching and 1 more: " in found


def test_cells_that_differ_in_their_seed_alone_are_rehearsed_once(
    request_of, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(of_cells, "_trouble", lambda one, *rest: seen.append(one.cell.name) or "")
    grid = request_of("Grid.axes = {'adamw.lr': [0.1, 0.2]}", "Grid.repeat = {'run.seed': [0, 1]}")
    planned = plan(grid, grid.axes())
    rehearse(planned.cells, tmp_path / "out", planned.launcher)
    assert (len(planned.cells), len(seen)) == (4, 2)


def test_training_after_a_rehearsal_is_equal_to_the_last_bit(request_of, tmp_path):
    text = TINY.replace("@flow_matching()", "@decm()") + "decm.teacher = @frozen()\n"
    text += "frozen.pretrain = 0.5\nrun.steps = 2\nrun.evaluate_every = 1\n"
    weights = []
    for name, rehearsed in (("with", True), ("without", False)):
        torch.manual_seed(1)
        compare(request_of(text=text), tmp_path / name, rehearsal=rehearsed)
        weights.append(load_file(tmp_path / name / "decm" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_rehearsal_moves_no_random_state_and_leaves_no_file_or_binding(request_of, tmp_path):
    def states():
        drawn = torch.get_rng_state().tolist(), random.getstate()
        return *drawn, np.random.get_state()[1].tolist(), gin_setup.full_text()

    planned = plan(request_of(), Declared())
    before, files = states(), sorted(tmp_path.rglob("*"))
    rehearse(planned.cells, tmp_path / "deep" / "out", planned.launcher)
    assert states() == before
    assert sorted(tmp_path.rglob("*")) == files


def test_a_rehearsal_is_bounded(request_of, tmp_path, monkeypatch):
    sizes = []
    execute = rehearsal.execute
    monkeypatch.setattr(
        rehearsal, "execute", lambda small, *rest: sizes.append(small) or execute(small, *rest)
    )
    large = request_of(
        "run.steps = 100000000", "run.batch_size = 4096", "run.nfe = (1000000,)",
        "run.num_samples = 50000",
    )  # fmt: skip
    planned = plan(large, Declared())
    rehearse(planned.cells, tmp_path / "out", planned.launcher)
    (small,) = sizes
    assert (small.batch_size, small.num_samples) == (rehearsal.ROWS, rehearsal.SAMPLES)
    assert small.budget.amount == rehearsal.STEPS
    assert max(small.nfe) <= rehearsal.MOST_NFE


def test_every_door_rehearses_unless_it_is_told_not_to(request_of, tmp_path, monkeypatch):
    wrong = request_of(*TOO_FEW)
    for door in (
        lambda: compare(wrong, tmp_path / "a"),
        lambda: run_grid(wrong, tmp_path / "b"),
        lambda: dry_run(wrong, tmp_path / "c"),
        lambda: rehearse_here(wrong),
    ):
        with pytest.raises(ValueError, match="the rehearsal failed, so nothing was trained"):
            door()
    monkeypatch.setattr(comparison, "_run", lambda *rest, **more: "ran")
    assert compare(wrong, tmp_path / "a", rehearsal=False) == "ran"
    assert run_grid(wrong, tmp_path / "b", rehearsal=False) == "ran"


def test_what_is_rehearsed_may_read_a_relative_path_by_a_macro(request_of, tmp_path, monkeypatch):
    class OfFile(Mixture):
        """Needs a file."""

        local_paths = ("file",)

        def __init__(self, file: str):
            Path(file).read_text()
            super().__init__()

    monkeypatch.chdir(tmp_path)
    for name in ("here", "there"):
        (tmp_path / name).touch()
    bindings = ("run.dataset = @of_file()", "of_file.file = %PLACE")
    with datasets.temporary("of_file", OfFile):
        axes = "Grid.axes = {'PLACE': ['here', 'there']}"
        grid = request_of(*bindings, axes, text=FLAT + "PLACE = 'here'\n")
        planned = plan(grid, grid.axes())
        assert [one.values for one in planned.cells] == [
            (("PLACE", "'here'"),), (("PLACE", "'there'"),),
        ]  # fmt: skip
        rehearse(planned.cells, tmp_path / "out", planned.launcher)
    took = [gin_setup.bindings_of(one.operative)["of_file.file"] for one in planned.cells]
    assert took == [repr(str(tmp_path / name)) for name in ("here", "there")]


def test_a_launcher_whose_processes_cannot_share_the_batch_is_found(request_of, tmp_path):
    class Several(InProcess):
        ranks = 2

    planned = plan(request_of(), Declared())
    with pytest.raises(ValueError, match="Grid.launcher gives each cell 2"):
        rehearse(planned.cells, tmp_path / "out", Several())


def test_the_cause_names_the_part_in_whose_code_it_arose():
    found = ""
    with metrics.temporary("mine_metric", metric_that(lambda samples, reference: 1 / 0)) as Mine:
        try:
            Mine()(None, None)
        except ZeroDivisionError as error:
            found = rehearsal.cause(error)
    assert found == "in the metric @mine_metric: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("macro", [False, True], ids=["bound", "behind a macro"])
def test_a_relative_folder_passes_and_a_run_of_it_goes_on(
    request_of, tmp_path, monkeypatch, caplog, macro
):
    monkeypatch.chdir(tmp_path)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / "mine").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "mine" / f"{number}.png")
    where = "%PLACE\nPLACE = 'mine'" if macro else "'mine'"
    pictures = f"@image_folder()\nimage_folder.resolution = 8\nimage_folder.folder = {where}"
    text = FLAT.replace("@gaussian()", pictures).replace("@mlp", "@unet").replace("mlp.dim = 8", "")
    text = text.replace("mlp.depth = 1", "unet.channels = 8")
    caplog.set_level("INFO")
    compare(request_of(text=text), tmp_path / "out")
    (tmp_path / "out" / "flow_matching" / "result.json").unlink()
    again = request_of("run.log_every = 2", "run.steps = 3", text=text)
    compare(again, tmp_path / "out", resume=True, rehearsal=False)
    assert "goes on with run.log_every" in caplog.text
    assert "image_folder.folder," not in caplog.text


def test_a_value_that_gin_reads_back_as_another_is_found():
    with pytest.raises(ValueError, match=r"mlp.dim = 8, read back 16"):
        of_cells._check_text("mlp.dim = 8", "mlp.dim = 16")
    with pytest.raises(ValueError, match=r"mlp.dim = 8, read back unset"):
        of_cells._check_text("mlp.dim = 8", "")


def test_the_run_that_goes_on_has_a_network_of_its_own(request_of, tmp_path, monkeypatch):
    """An engine of ZeRO stage 3 leaves no whole tensor in the network that it trained."""

    def cut(experiment, *arguments, fit=rehearsal.fit_experiment, **more):
        state = fit(experiment, *arguments, **more)
        for parameter in experiment.net.parameters():
            parameter.data = parameter.data.new_empty(0)
        return state

    monkeypatch.setattr("benchmarks.runs.rehearsal.fit_experiment", cut)
    monkeypatch.setattr("benchmarks.runs.execute.fit_experiment", cut)
    planned = plan(request_of(), Declared())
    rehearse(planned.cells, tmp_path / "out", planned.launcher)


HOLDS = """
import fcntl, sys, time
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(60)
"""


def test_what_killed_rehearsals_left_is_removed_and_a_live_one_stays(request_of, tmp_path):
    out = tmp_path / "out"
    dead, live, new, old = (out / f".rehearsal-{n}" for n in ("dead", "live", "new", "old"))
    for folder in (dead, live, new, old):
        folder.mkdir(parents=True)
    for folder in (dead, live):
        (folder / "live").touch()
    os.utime(old, (0, 0))  # of an earlier version, without a lock
    words = [sys.executable, "-S", "-c", HOLDS, str(live / "live")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        compare(request_of(), out)
        assert [folder.exists() for folder in (dead, live, new, old)] == [False, True, True, False]
        other.kill()
    compare(request_of(), out, resume=True)
    assert not live.exists()


def test_a_rehearsal_holds_its_lock(tmp_path):
    with of_cells._place(tmp_path) as folder:
        assert [path.name for path in folder.iterdir()] == ["live"]


def test_a_grid_over_data_of_several_shapes_has_a_picture_of_each(request_of, tmp_path):
    two, three = (0.5, 0.5), (0.5, 0.5, 0.5)
    axes = {"gaussian.mean": [two, three], "gaussian.std": [two, three]}
    run_grid(
        request_of(f"Grid.axes = {axes}", "Grid.mode = 'zip'"), tmp_path / "out", rehearsal=False
    )
    assert [path.name for path in tmp_path.glob("out/*.png")] == ["samples.png"]
