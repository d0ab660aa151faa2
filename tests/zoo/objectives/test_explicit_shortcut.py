"""ESC is MeanFlow with settings: its gin file is used to the last part, and trains."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import entries

from benchmarks.experiments.build import run
from benchmarks.grids.comparison import compare
from benchmarks.grids.request import Request
from registry import gin_setup
from registry.protocols import Share, group_of
from registry.protocols.rows import read_share
from zoo.objectives.mean_flow import MeanFlow
from zoo.points.velocities import PlugIn
from zoo.times import LogitNormalPair, Progressive, law_at
from zoo.weighting import Adaptive, LearnedLogvar

FILES = ["data/digits.gin", "trainer/cpu.gin", "objective/explicit_shortcut.gin"]
SMALL = [
    *("run.objective = @mean_flow()", "run.backbone = @dit", "dit.patch = 4", "dit.dim = 8"),
    *("dit.depth = 1", "dit.num_heads = 2", "run.steps = 3", "run.batch_size = 64"),
]


def test_settings_are_those_of_the_released_code():
    gin_setup.parse(FILES, SMALL)
    objective = gin_setup.build("run.objective")
    assert objective == MeanFlow(
        velocity=PlugIn(fraction=0.2, group=32),
        times=Progressive(
            times=LogitNormalPair(mean=-0.4, std=1.0, off_diagonal_fraction=0.25), steps=20_000
        ),
        weight=LearnedLogvar(weight=Adaptive(power=1.0, offset=1e-3)),
    )
    assert group_of(objective) == 32


def test_batches_have_one_class_for_each_group_and_r_is_0_at_first():
    gin_setup.parse(FILES, SMALL)
    experiment = run()
    share = experiment.objective.velocity.group
    _, cond = read_share(experiment.dataset, 0, 64, 0, Share(group=share))
    assert all(len(labels.unique()) == 1 for labels in cond["label"].split(32))
    times = experiment.objective.times
    zero = []
    for step in (0, 10_000, 20_000):
        t, r = law_at(times, step)(4000, torch.Generator().manual_seed(0))
        zero.append(float((r[:1000] == 0).float().mean()))
        assert (t[1000:] == r[1000:]).all()
    assert zero == pytest.approx([1.0, 2 / 3, 0.0], abs=0.01)


def test_it_trains_some_steps(tmp_path):
    file = tmp_path / "esc.gin"
    more = [
        "run.recorder = @jsonl()",
        "run.num_samples = 12",
        "run.nfe = (1,)",
        "run.log_every = 1",
    ]
    lines = [f"include {name!r}" for name in FILES] + SMALL + more
    file.write_text("\n".join(lines))
    (row,) = compare(Request(file=file), tmp_path / "out").rows.values()
    (result,) = row.results
    assert result.steps == 3
    folder = next(path.parent for path in (tmp_path / "out").glob("*/record.jsonl"))
    logged = [e["values"] for e in entries(folder, "metrics") if "loss" in e["values"]]
    assert torch.tensor([values["loss"] for values in logged]).isfinite().all()
