"""A parametrisation in gin: what a run trains, records, exports and refuses."""

from __future__ import annotations

import pytest
from tiny_runs import FILE_ONLY, SIZES, sets, zoo

import benchmarks.grids.axes  # noqa: F401  registers Grid
import objective_zoo
from backbones.parametrisations import EDM, Data, RawVelocity, Trig
from backbones.pretrained.exported import load_exported
from benchmarks.experiments.build import run
from benchmarks.grids.request import Request
from benchmarks.planning.outline import outline
from objective_zoo import comparing
from registry import gin_setup
from zoo.teachers import Frozen

MLP = (*SIZES, "run.backbone = @mlp", "mlp.dim = 8", "mlp.depth = 1", "run.recorder = @jsonl()")
VECTORS = ["data/gaussian.gin", "trainer/cpu.gin"]


def built(*bindings: str):
    gin_setup.parse(VECTORS, [*MLP, *bindings])
    return run()


def test_run_trains_records_and_exports_what_its_readouts_mean(tmp_path):
    bound = (*FILE_ONLY, "run.parametrisation = @data()", "data.t_min = 0.1")
    words = ["run", "experiments/digits.gin", "--arm", "mean_flow", "--out", tmp_path / "out"]
    done = zoo(*words, *sets(*bound))
    assert done.status == 0, done.err
    folder = tmp_path / "out" / "mean_flow"
    kept = gin_setup.bindings_of((folder / "operative.gin").read_text())
    recorded = {key.split("/")[-1]: value for key, value in kept.items()}
    assert recorded["run.parametrisation"] == "@data()"
    assert recorded["data.t_min"] == "0.1"
    assert objective_zoo.load(folder).net.parametrisation == Data(t_min=0.1)
    done = zoo("export", folder, "--out", tmp_path / "exported")
    assert done.status == 0, done.err
    assert load_exported(tmp_path / "exported").parametrisation == Data(t_min=0.1)

    # A student of another meaning is refused, before it trains; one of the same starts from it.
    start = f"run.start_from = '{tmp_path / 'exported'}'"
    words[-1] = tmp_path / "student"
    done = zoo(*words, *sets(*FILE_ONLY, start))
    assert done.status == 2
    assert "its parametrisation is raw_velocity(), the teacher's data(t_min=0.1)" in done.err
    done = zoo(*words, *sets(*bound, start))
    assert done.status == 0, done.err


def test_parametrisations_are_listed_with_their_papers():
    listed = zoo("list", "--kind", "parametrisation")
    assert listed.status == 0
    assert "The readout is the clean data (x-prediction)" in listed.out
    assert "arXiv 2601.22158" in listed.out
    assert "raw_velocity" in zoo("list").out


def test_own_network_and_trained_teacher_have_the_parametrisation_of_the_run():
    bound = ("run.objective = @decm()", "decm.teacher = @frozen()", "frozen.pretrain = 0.5")
    experiment = built(*bound, "run.parametrisation = @edm()", "edm.sigma_data = 0.9")
    assert experiment.net.parametrisation == EDM(sigma_data=0.9)
    assert isinstance(experiment.teacher, Frozen)
    assert experiment.teacher.network.parametrisation == EDM(sigma_data=0.9)
    assert built("run.objective = @mean_flow()").net.parametrisation == RawVelocity()


def test_plan_outlines_the_parametrisation_too(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text("include 'experiments/mixture.gin'\n")
    request = Request(file=file, bindings=("run.parametrisation = @edm()",))
    assert outline(request, "mean_flow").step.net.parametrisation == EDM()


def test_python_takes_a_name_or_an_instance():
    for given in ("data", Data()):
        planned = objective_zoo.experiment(
            objective="flow_matching", backbone="mlp", dataset="mixture", parametrisation=given
        )
        assert "run.parametrisation = @data()" in planned.config
    with pytest.raises(ValueError, match=r"parametrisation = Data is a class; .*Data\(\)"):
        objective_zoo.experiment(
            objective="flow_matching", backbone="mlp", dataset="mixture", parametrisation=Data
        )
    assert "parametrisation" in comparing.KINDS


@pytest.mark.parametrize(
    ("bindings", "said"),
    [
        (
            ("run.parametrisation = @trig()",),
            r"@trig\(\) holds on the path 'trigflow', and the path of mean_flow is 'linear'. Bind "
            r"mean_flow.path = @trigflow\(\), or .*: data, edm, raw_velocity, scaled_by_guidance",
        ),
        (
            ("run.parametrisation = @edm()", "mean_flow.path = @trigflow()"),
            r"@edm\(\) holds on the path 'linear', .*'trigflow': raw_velocity, .*, trig",
        ),
        (("run.parametrisation = @data",), r"run.parametrisation = @data lacks brackets"),
        (("run.parametrisation = @linear()",), r"must be a parametrisation, such as @data\(\)"),
        (("run.parametrisation = 'data'",), r"must be a parametrisation, such as @data\(\)"),
        (("run.parametrisation = @data()", "data.t_min = 2.0"), r"data.t_min = 2.0 must be"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(bindings, said):
    with pytest.raises(ValueError, match=said):
        built("run.objective = @mean_flow()", *bindings)


def test_parametrisation_of_the_path_is_taken():
    bound = ("run.objective = @mean_flow()", "mean_flow.path = @trigflow()")
    experiment = built(*bound, "run.parametrisation = @trig()")
    assert experiment.net.parametrisation == Trig()
    assert experiment.derivative_error["derivative_error"] < 1e-5


def test_runs_without_one_are_recorded_as_they_were_before_there_was_any():
    """So that grids that were begun go on, and reports set old and new runs in one row."""
    built("run.objective = @mean_flow()")
    assert "parametrisation" not in gin_setup.operative_text()
    assert not any("parametrisation" in key for key in gin_setup.operative_values())
    built("run.objective = @mean_flow()", "run.parametrisation = @raw_velocity()")
    assert gin_setup.operative_values()["run.parametrisation"] == "@raw_velocity()"
