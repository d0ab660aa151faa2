"""Trained derivatives, teachers that a gradient passes and features, in two processes of ZeRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zero_trained_work
import zero_work
from zero_trained_work import STAGES, plain

CASES = [(stage, name) for name, stages in STAGES.items() for stage in stages]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("trained")
    return zero_work.spawn(2, "parity", folder, file=zero_trained_work.__file__)


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, Any]]:
    return {name: plain(name) for name in STAGES}


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "name"), CASES)
def test_two_processes_train_what_one_does(found: Any, one: Any, stage: int, name: str) -> None:
    """To the order of sums in float32; differences divide what is rounded by their step."""
    tolerance = 2e-3 if "differences" in name else 1e-5
    ours, theirs = found[stage, name], one[name]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=20 * tolerance)
    for key, value in theirs["net"].items():
        torch.testing.assert_close(ours["net"][key], value, rtol=tolerance, atol=tolerance)


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_with_features_resumes_and_does_not_save_them(found: Any, stage: int) -> None:
    whole, resumed = found[stage, "whole"]["losses"], found[stage, "resumed"]["losses"]
    assert resumed == whole[2:]
    assert all(
        value.equal(found[stage, "resumed"]["net"][key])
        for key, value in found[stage, "whole"]["net"].items()
    )
    assert "zero.json" in found[stage, "files"]
