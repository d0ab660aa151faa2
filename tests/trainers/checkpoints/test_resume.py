"""Exact resume: a run that goes on from a checkpoint equals one that was never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from few_rows import for_few_rows
from torch import nn
from trainer_toys import GroupedData, StopAt, ToyNet, ToyObjective, run, same, trained

import registry
import zoo  # noqa: F401  registers the objectives
from backbones import build_network
from backbones.mlp import MLP
from registry.protocols import required_heads
from trainers import (
    AdamW,
    Budget,
    Callback,
    CheckpointCallback,
    Cosine,
    RAdam,
    TorchEngine,
    TrainState,
)
from trainers.checkpoints.checkpoint import checkpoints, latest
from zoo.teachers import Frozen


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": AdamW(lr=1e-2), "budget": Budget(steps=12)},
        {"optimizer": RAdam(lr=1e-2), "budget": Budget(images=96)},
        {
            "optimizer": AdamW(lr=1e-2),
            "engine": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
        },
        {"optimizer": AdamW(lr=1e-2), "engine": {"precision": "bf16"}},
    ],
    ids=["adamw", "radam", "accumulate", "bf16"],
)
def test_resume_is_bit_equal_to_an_uninterrupted_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """With an EMA teacher, dropout, a cosine with warm-up and two averages."""

    def go(*more: Callback, **changes: Any) -> tuple[TrainState, list[torch.Tensor]]:
        arguments: dict[str, Any] = {
            "budget": Budget(steps=12),
            "schedule": Cosine(warmup_steps=3),
            "seed": 5,
            **settings,
            "engine": TorchEngine(**settings.get("engine", {})),
            "ema_decays": (0.5, 0.99),
            "callbacks": more,
        }
        return run(**arguments | changes)

    whole, losses = go()
    first, before = go(CheckpointCallback(), StopAt(5), folder=tmp_path)
    torch.manual_seed(1)
    state, after = go(
        CheckpointCallback(), net=ToyNet(seed=77), objective=ToyObjective(), folder=tmp_path,
        resume=True,
    )  # fmt: skip
    assert first.step == 5
    assert state.resumed == tmp_path / "checkpoints" / "step_00000005"
    assert torch.equal(torch.stack(before + after), torch.stack(losses))
    assert (state.step, state.images) == (whole.step, whole.images)
    assert same(state.engine.module.state_dict(), whole.engine.module.state_dict())
    for name in whole.emas:
        assert same(state.emas[name].state_dict(), whole.emas[name].state_dict())
    assert state.lr == whole.lr


@pytest.mark.parametrize("name", [*registry.objectives.names(), "decm_distilled"])
def test_resume_is_bit_equal_for_every_objective(name: str, tmp_path: Path) -> None:
    """Stopped where neither DE-CM's cycle of three nor an accumulation ends."""

    def network(seed: int, keys: tuple[str, ...]) -> nn.Module:
        torch.manual_seed(seed)
        return build_network(partial(MLP, dim=32, depth=1), (2,), 3, keys)

    def go(seed: int, **changes: Any) -> tuple[TrainState, list[torch.Tensor]]:
        if name == "decm_distilled":
            objective = registry.objectives.get("decm")(teacher=Frozen())
            objective.teacher.attach(network(5, ("v",)))
        else:
            objective = for_few_rows(registry.objectives.get(name)())
        net = network(seed, required_heads(objective))
        given = {"net": net, "objective": objective, "dataset": GroupedData(), **changes}
        return run(batch_size=16, budget=Budget(steps=6), **given)

    whole, losses = go(1)
    _, before = go(1, folder=tmp_path, callbacks=[CheckpointCallback(), StopAt(2)])
    state, after = go(2, folder=tmp_path, resume=True)
    assert torch.equal(torch.stack(before + after), torch.stack(losses))
    assert same(state.engine.module.state_dict(), whole.engine.module.state_dict())


def test_resume_of_a_finished_run_does_nothing_and_keeps_its_time(tmp_path: Path) -> None:
    finished, _ = run(folder=tmp_path, callbacks=[CheckpointCallback()])
    state, losses = run(net=ToyNet(seed=9), folder=tmp_path, resume=True)
    assert not losses
    assert (state.step, state.finished) == (10, True)
    assert same(state.net.state_dict(), finished.net.state_dict())
    assert 0 <= state.seconds - finished.seconds < 0.5 * finished.seconds


def test_resume_without_any_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    _, losses = run()
    state, again = run(folder=tmp_path, resume=True)
    assert state.resumed is None
    assert torch.equal(torch.stack(losses), torch.stack(again))


def test_resume_with_another_seed_or_batch_size_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path)
    run(folder=tmp_path, resume=True, seed=0, batch_size=8)
    assert not caplog.records
    run(folder=tmp_path, resume=True, seed=3, batch_size=4)
    assert "seed = 0 and goes on with 3" in caplog.text
    assert "batch_size = 8 and goes on with 4" in caplog.text


def test_resume_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="folder"):
        run(resume=True)
    with pytest.raises(ValueError, match="folder"):
        run(callbacks=[CheckpointCallback()])


def test_a_new_run_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"earlier run \(newest: step_00000009\)"):
        trained(tmp_path)


def test_killed_process_resumes_bit_equal(tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment, for real."""
    code = (
        "from pathlib import Path; from trainer_toys import run;"
        "from trainers import Budget, CheckpointCallback;"
        f"run(folder=Path({str(tmp_path)!r}), budget=Budget(steps=10**7),"
        "callbacks=[CheckpointCallback(every=1, keep=3)])"
    )
    root = Path(__file__).parents[3]
    paths = [str(root / "tests" / "support"), str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    folder = tmp_path / "checkpoints"
    deadline = time.monotonic() + 60
    try:
        while len(checkpoints(folder)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    newest = latest(folder)
    assert newest is not None
    done = int(newest.name.removeprefix("step_"))
    budget = Budget(steps=done + 5)
    state, losses = run(folder=tmp_path, resume=True, budget=budget)
    whole, all_losses = run(budget=budget)
    assert torch.equal(torch.stack(losses), torch.stack(all_losses[done:]))
    assert same(state.net.state_dict(), whole.net.state_dict())
