"""A finished run that the tests of evaluations share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import DIGITS, FILE_ONLY, sets, zoo


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sampler draws while it runs."""
    out = tmp_path_factory.mktemp("evaluate") / "run"
    how = (*FILE_ONLY, "mean_flow/run.sampler = @restart()")
    done = zoo("run", DIGITS, "--arm", "mean_flow", *sets(*how), "--out", out)
    assert done.status == 0, done.err
    return out / "mean_flow"
