"""Four processes against one, and runs that go on with another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zero_work
from zero_work import CROSSING, FOUR, OTHER, SAVED, STAGES, found, train

from trainers import TorchEngine

pytestmark = [pytest.mark.deepspeed, pytest.mark.faults, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return zero_work.spawn(4, "four", tmp_path_factory.mktemp("four"), timeout=2000)


@pytest.mark.parametrize(("stage", "name"), FOUR)
def test_four_processes_train_as_one(stage: int, name: str, four: dict[Any, Any]) -> None:
    """Though a quarter, say, of 12 rows is 3, and each process has 3 rows of all kinds."""
    ours, alone = (
        four[stage, name],
        found(*train(name, TorchEngine(max_grad_norm=1.0), batch_size=12)),
    )
    # float32 sums in another order; norms are of order 1, the weights move by 0.05
    torch.testing.assert_close(ours["losses"], alone["losses"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["norms"], alone["norms"], rtol=1e-4, atol=1e-6)
    assert ours["module"].keys() == alone["module"].keys()
    for key, value in alone["module"].items():
        torch.testing.assert_close(ours["module"][key], value, rtol=1e-5, atol=2e-6, msg=key)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 1), (1, 2)])
def test_run_goes_on_in_another_number_of_processes(
    before: int, after: int, tmp_path: Path
) -> None:
    """At the stage that it was saved at, and at another one; nothing is lost."""
    whole = _of(before, "save", tmp_path)
    gone_on = _of(after, "go_on", tmp_path)
    for stage in STAGES:
        for name in CROSSING:
            for other in (stage, OTHER[stage]):
                # the same Adam state, float32 sums in another order
                torch.testing.assert_close(
                    gone_on[stage, name, other], whole[stage, name][SAVED:], rtol=1e-4, atol=0
                )


def _of(count: int, what: str, folder: Path) -> dict[Any, Any]:
    return getattr(zero_work, what)(folder) if count == 1 else zero_work.spawn(count, what, folder)
