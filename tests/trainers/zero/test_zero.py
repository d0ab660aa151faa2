"""DeepSpeed ZeRO in two processes: what it trains and resumes against one plain process."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_pair
import zero_trained_work
import zero_work
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from zero_toys import names
from zero_work import OPTIONS, SAVED, STAGES, found, train

from backbones.pretrained.tensors import DIGEST
from trainers import Budget, TorchEngine
from trainers.checkpoints.checkpoint import latest
from trainers.checkpoints.whole_folders import BrokenCheckpoint
from trainers.zero.checkpoint import consolidate
from zoo.derivatives.methods import FiniteDifference

pytestmark = pytest.mark.timeout(1600)  # the two processes do all cases before the first test

# --- against one process


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What two processes came to, for every case; to start them costs more than most of these."""
    folder = tmp_path_factory.mktemp("zero")
    return zero_work.spawn(2, "everything", folder, timeout=1500.0, file=zero_pair.__file__), folder


@pytest.fixture(scope="module")
def trained(everything: Any) -> dict[Any, Any]:
    return everything[0]["parity"]


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    known = (*names(), *zero_work.WHOLE_BATCH)
    return {name: found(*train(name, TorchEngine(max_grad_norm=1.0))) for name in known}


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "name"), zero_work.PARITY)
def test_two_processes_train_as_one(
    stage: int, name: str, trained: dict[Any, Any], plain: dict[str, dict[str, Any]]
) -> None:
    """Losses, gradient norms, and what weights, averages and teachers come to by descent."""
    check_as_one(trained[stage, name], plain[name])


def check_as_one(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    # float32 sums in another order; norms are of order 1, the weights move by 0.05
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["norms"], theirs["norms"], rtol=1e-4, atol=1e-6)
    assert ours["module"].keys() == theirs["module"].keys()
    for key, value in theirs["module"].items():
        torch.testing.assert_close(ours["module"][key], value, rtol=1e-5, atol=2e-6, msg=key)
    torch.testing.assert_close(ours["sampled"], theirs["sampled"], rtol=1e-4, atol=1e-5)
    assert ours["same"] == {"weights": True, "released": True}


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_processes_train_every_other_objective_as_one(
    tmp_path: Path, plain: dict[str, dict[str, Any]]
) -> None:
    told = zero_work.spawn(2, "parity_too", tmp_path)
    assert list(told) == zero_work.PARITY_TOO
    for (_, name), ours in told.items():
        check_as_one(ours, plain[name])


@pytest.mark.deepspeed
@pytest.mark.parametrize("key", OPTIONS)
def test_options_train_as_one_process(
    key: str, trained: dict[Any, Any], plain: dict[str, dict[str, Any]]
) -> None:
    ours, theirs = trained[key], plain["mean_flow"]
    # half precision rounds at 4e-3 (bf16) and 5e-4 (fp16)
    tolerance = {"bf16": 2e-2, "fp16": 5e-3}.get(key, 1e-5)
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=tolerance, atol=tolerance)
    for name, value in theirs["net"].items():
        torch.testing.assert_close(ours["net"][name], value, rtol=0, atol=max(tolerance / 2, 2e-6))


@pytest.mark.deepspeed
def test_derivative_without_its_rule_is_refused_or_replaced_aloud(trained: dict[Any, Any]) -> None:
    refused, replaced, losses = trained["no rule"]
    assert "zero_engine.stage = 2" in refused
    assert "zero_engine.without_exact = 'finite_difference'" in refused
    assert replaced == repr(FiniteDifference())
    assert "nan" not in losses


@pytest.fixture(scope="module")
def gradients() -> dict[str, Tensor]:
    state, _ = train(
        "mean_flow", TorchEngine(), optimizer=zero_work.Sgd(lr=1.0), budget=Budget(steps=1)
    )
    return zero_work.moved(state, "mean_flow")


def _wrong(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The weights whose gradients differ; float32 sums in another order are no difference."""
    return [k for k, g in theirs.items() if not torch.allclose(ours[k], g, rtol=1e-4, atol=1e-6)]


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_every_gradient_is_that_of_the_whole_batch_in_every_process(
    stage: int, trained: dict[Any, Any], gradients: dict[str, Tensor]
) -> None:
    told = trained["gradients", f"stage {stage}"]
    assert told["differ"] == []
    assert _wrong(told["gradients"], gradients) == []


@pytest.mark.deepspeed
@pytest.mark.parametrize("how", [how for how in zero_work.GRADIENTS if "," in how])
def test_gradient_that_is_not_synchronised_is_noticed(
    how: str, trained: dict[Any, Any], gradients: dict[str, Tensor]
) -> None:
    """Processes hold different rows: without the sum over them every weight goes its own way."""
    told = trained["gradients", how]
    learns = [name for name, g in gradients.items() if g.abs().max() > 1e-5]
    assert len(learns) > 20
    assert set(learns) <= set(_wrong(told["gradients"], gradients))
    if how.startswith("stage 0"):  # in the others each weight is updated by one process alone
        assert set(learns) <= set(told["differ"])


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", zero_work.DIFFERENT)
def test_gradient_that_is_not_finite_in_one_process_stops_or_is_left_out_in_all(
    stage: int, trained: dict[Any, Any]
) -> None:
    stopped, skipped = (trained["bad gradient", stage, policy] for policy in ("stop", "skip"))
    assert "step 2: the loss is finite, but its gradient is not" in stopped["told"][0]
    assert "row " in stopped["told"][0]
    assert stopped["told"][1] == stopped["told"][0]
    assert stopped["finite"]
    assert skipped["told"] == ["", ""]
    assert skipped["finite"]
    first, second = skipped["losses"]
    assert first == second
    assert len(first) == 3  # all steps, and the third from finite weights
    assert all(map(math.isfinite, first))


# --- checkpoints


@pytest.mark.deepspeed
def test_loss_scale_has_moved_when_it_is_resumed(resumed: Any) -> None:
    """Or the resume of fp16 would prove nothing."""
    for stage in (2, 3):
        scales = resumed[0][stage, "fp16"]["whole"]["scales"]
        assert scales[SAVED - 1 :] == [(2.0**15, 2), (2.0**15, 3), (2.0**16, 4), (2.0**16, 5)]


@pytest.fixture(scope="module")
def resumed(everything: Any) -> tuple[dict[Any, Any], Path]:
    found, folder = everything
    return found["resume"], folder / "resume"


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "name"), [*zero_work.RESUMED, (2, "fp16"), (3, "fp16")])
def test_resume_is_bit_equal_at_the_same_stage(stage: int, name: str, resumed: Any) -> None:
    """Losses, weights, averages and teachers."""
    check_bit_equal(resumed[0][stage, name])


def check_bit_equal(told: Any) -> None:
    assert told["same"]["losses"] == told["whole"]["losses"][SAVED:]
    assert told["same"]["norms"] == told["whole"]["norms"][SAVED:]
    assert told["same"]["scales"] == told["whole"]["scales"][SAVED:]
    assert told["whole"]["module"].keys() == told["same"]["module"].keys()
    for key, value in told["whole"]["module"].items():
        assert torch.equal(told["same"]["module"][key], value), key


@pytest.mark.slow
@pytest.mark.deepspeed
def test_resume_of_every_other_objective_is_bit_equal(tmp_path: Path) -> None:
    told = zero_work.spawn(2, "resume_too", tmp_path)
    assert list(told) == zero_work.RESUMED_TOO
    for case in told.values():
        check_bit_equal(case)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_resume_loses_nothing_at_another_stage(stage: int, resumed: Any) -> None:
    told = resumed[0][stage, "dumo"]
    # the same Adam state, float32 sums in another order
    torch.testing.assert_close(
        told["other"]["losses"], told["whole"]["losses"][SAVED:], rtol=1e-4, atol=0
    )


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_resume_in_one_process_loses_nothing(stage: int, resumed: Any) -> None:
    results, folder = resumed
    _, watch = zero_work.go("dumo", stage, folder / f"dumo{stage}", resume=True)
    torch.testing.assert_close(
        watch.losses, results[stage, "dumo"]["whole"]["losses"][SAVED:], rtol=1e-4, atol=0
    )


@pytest.mark.deepspeed
def test_consolidated_weights_are_those_of_the_checkpoint(resumed: Any, tmp_path: Path) -> None:
    _, folder = resumed
    loaded = []
    for stage in STAGES:  # all four made the same run
        checkpoint = folder / f"dumo{stage}" / "checkpoints" / "step_00000002"
        consolidate(checkpoint, tmp_path / "net.safetensors")
        consolidate(checkpoint, tmp_path / "ema.safetensors", decay="0.9")
        loaded.append([load_file(tmp_path / f"{n}.safetensors") for n in ("net", "ema")])
    for net, ema in loaded:
        assert net.keys() == ema.keys() == zero_work.network(("u", "v")).state_dict().keys()
        for name, value in loaded[0][0].items():
            torch.testing.assert_close(net[name], value)
            torch.testing.assert_close(ema[name], loaded[0][1][name])
    assert any(not torch.equal(net[name], ema[name]) for name in net)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert DIGEST in file.metadata()  # so that damage is noticed when it is read
    with pytest.raises(ValueError, match=r"no average at decay 0.7; it has 0.5, 0.9"):
        consolidate(checkpoint, tmp_path / "x.safetensors", decay="0.7")


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", ["rank_00001.safetensors", "zero.json"])
def test_piece_that_was_truncated_is_refused_by_name(
    name: str, resumed: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(resumed[1] / "dumo3" / "checkpoints", folder)
    path = folder / "step_00000002" / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BrokenCheckpoint, match="none of the 1 checkpoints"):
        latest(folder)
    assert f"{path} has" in caplog.text


@pytest.mark.deepspeed
def test_checkpoints_do_not_cross_engines(resumed: Any) -> None:
    with pytest.raises(ValueError, match="was made by zero_engine"):
        train("dumo", TorchEngine(), folder=resumed[1] / "dumo2", resume=True)


# --- trained derivatives, teachers that a gradient passes, features

TRAINED = [(s, name) for name, stages in zero_trained_work.STAGES.items() for s in stages]


@pytest.fixture(scope="module")
def by_derivative(everything: Any) -> dict[Any, Any]:
    return everything[0]["trained"]


@pytest.fixture(scope="module")
def plain_by_derivative() -> dict[str, dict[str, Any]]:
    return {name: zero_trained_work.plain(name) for name in zero_trained_work.STAGES}


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "name"), TRAINED)
def test_two_processes_train_what_one_does(
    by_derivative: Any, plain_by_derivative: Any, stage: int, name: str
) -> None:
    """To the order of sums in float32; differences divide what is rounded by their step."""
    tolerance = 2e-3 if "differences" in name else 1e-5
    ours, theirs = by_derivative[stage, name], plain_by_derivative[name]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=20 * tolerance)
    for key, value in theirs["net"].items():
        torch.testing.assert_close(ours["net"][key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_features_resumes_and_does_not_save_them(by_derivative: Any, stage: int) -> None:
    whole, resumed = (
        by_derivative[stage, "whole"]["losses"],
        by_derivative[stage, "resumed"]["losses"],
    )
    assert resumed == whole[2:]
    assert all(
        value.equal(by_derivative[stage, "resumed"]["net"][key])
        for key, value in by_derivative[stage, "whole"]["net"].items()
    )
    assert "zero.json" in by_derivative[stage, "files"]
