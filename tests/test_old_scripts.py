"""Files that people wrote for version 0.1: their imports, their command lines, their launchers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest

from registry import launchers
from registry.protocols import Ended, Job
from zoo.derivatives import one_pass

# What documentation named, and what the parts that shipped took from each other: a part of one's
# own was written after these.
NAMES = {
    "backbones.embeddings": "Conditioning modulate zero_",
    "backbones.trunk": "Trunk",
    "benchmarks.exported": "load_exported",
    "registry": "backbones datasets derivatives heads metrics objectives paths recorders residuals "
    "samplers teachers time_laws weights",
    "registry.protocols": "Batch Cond Coupling Dataset Derivative GuidanceLaw LossOutput Metric "
    "NULL_LABEL Network PathSample Recorder Reference Residual RunRecord Share Shareable Teacher "
    "couples_rows parts read_share required_heads",
    "zoo.derivatives": "Dual FiniteDifference Jvp derivative_of_u no_gradient replay_rng "
    "with_derivatives",
    "zoo.guidance": "check_interval drop_labels guided_target guided_velocity unlabelled",
    "zoo.one_pass": "Moved OnePass apart outputs_and_derivative outputs_then_derivative",
    "zoo.ops": "clipped first_rows like mean_flat normal_like repeat_rows rms rows_from sum_flat",
    "zoo.paths": "Linear TrigFlow",
    "zoo.residuals": "Exact Rcgm",
    "zoo.samplers": "ClassifierFree Euler FlowMap Heun InputGuidance Mix Restart check_sampler "
    "euler_step even_times guided_network jump shifted valid_samplers",
    "zoo.teachers": "EmaTeacher Frozen Online",
    "zoo.times": "LogitNormalPair",
    "zoo.weighting": "Adaptive",
}


@pytest.mark.parametrize("module", NAMES)
def test_part_of_ones_own_finds_what_it_imported(module):
    found = import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_former_address_has_the_functions_of_the_present_one():
    former = import_module("zoo.one_pass")
    assert former.outputs_and_derivative is one_pass.outputs_and_derivative
    assert former.OnePass is one_pass.OnePass


@pytest.mark.parametrize("module", ["benchmarks.cli", "benchmarks.loading"])
def test_documented_module_is_still_a_command(module, tmp_path):
    command = [sys.executable, "-P", "-m", module, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


class OldLauncher:
    def __call__(self, jobs: list[Job]) -> Iterator[Ended]:
        yield from ()


def test_launcher_that_is_not_handed_what_to_run_is_told_when_it_registers():
    wanted = r"'old'.* must accept __call__\(self, jobs, run_cell\)"
    with pytest.raises(ValueError, match=wanted):
        launchers.register("old")(OldLauncher)
    assert "old" not in launchers
