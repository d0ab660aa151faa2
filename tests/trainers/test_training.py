"""The settings of a training: given as one object or one by one, they train the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from tiny_runs import DIGITS, TINY
from trainer_toys import Losses, ToyData, ToyNet, ToyObjective

from benchmarks.experiments.build import run
from registry import gin_setup
from trainers import AdamW, Budget, Training, fit


def settings(**changes: Any) -> dict[str, Any]:
    given = {"net": ToyNet(), "objective": ToyObjective(), "dataset": ToyData(), "batch_size": 8}
    return given | {"budget": Budget(steps=3), "optimizer": AdamW(lr=1e-2)} | changes


def rows(*given: Any, **more: Any) -> list[torch.Tensor]:
    losses = Losses()
    fit(*given, **more, callbacks=[losses])
    return losses.rows


def test_fit_takes_a_training_or_its_settings():
    one_by_one = rows(**settings())
    together = rows(Training(**settings()))
    assert len(together) == len(one_by_one) == 3
    assert all(a.equal(b) for a, b in zip(together, one_by_one, strict=True))


def test_settings_beside_a_training_change_it():
    other = rows(Training(**settings(seed=1)))
    assert not all(a.equal(b) for a, b in zip(rows(**settings()), other, strict=True))
    changed = rows(Training(**settings()), seed=1)
    assert all(a.equal(b) for a, b in zip(changed, other, strict=True))
    assert len(rows(Training(**settings()), budget=Budget(steps=2))) == 2


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="batchsize"):
        fit(**settings(batchsize=8))


def test_training_of_an_experiment_is_all_that_the_experiment_says():
    given = ["run.objective = @flow_matching()", "run.recorder = @null()", "run.seed = 3"]
    given += ["run.power_emas = (0.1,)", "run.ema_snapshots = 2", "run.ema_decay = (0.9, 0.99)"]
    gin_setup.parse([DIGITS], [*TINY, *given])
    experiment = run()
    names = {field.name: field.name for field in fields(Training)} | {"ema_decays": "ema_decay"}
    for name, own in names.items():
        assert getattr(experiment.training, name) is getattr(experiment, own), name
