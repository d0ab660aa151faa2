"""What the processes of test_zero.py train: trained derivatives, `through`, features."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from feature_toys import Matching
from torch import nn
from trained_derivatives import Lsd, Tvm
from zero_toys import Pictures, Sgd
from zero_work import SMALL, found, main, train

from backbones.dit import DiT
from backbones.network import build_network
from trainers import Budget, CheckpointCallback
from trainers.engines import TorchEngine
from trainers.zero.engine import ZeroEngine
from zoo.derivatives.methods import Dual, FiniteDifference
from zoo.features import RandomConvolutions
from zoo.objectives.self_distillation import SelfDistillation
from zoo.objectives.terminal_velocity import TerminalVelocity
from zoo.teachers import EmaTeacher, Online
from zoo.weighting import Unweighted

CASES: dict[str, Any] = {
    "lsd": lambda: Lsd(derivative=Dual(), off_diagonal_fraction=0.5),
    "tvm": lambda: Tvm(derivative=Dual(), through=True),
    "tvm, shared": lambda: Tvm(
        derivative=Dual(), teacher=EmaTeacher(decay=0.5, dropout="shared"), through=True
    ),
    "self_distillation": lambda: SelfDistillation(weight=Unweighted()),
    "self_distillation, full": lambda: SelfDistillation(gradient="full", weight=Unweighted()),
    "terminal_velocity": TerminalVelocity,
    "lsd, differences": lambda: Lsd(derivative=FiniteDifference(), off_diagonal_fraction=0.5),
    "tvm, differences": lambda: Tvm(derivative=FiniteDifference(), through=True),
    "online, differences": lambda: Tvm(
        derivative=FiniteDifference(), teacher=Online(), through=True
    ),
    "features": lambda: Matching(features=RandomConvolutions(channels=1, widths=(8,))),
}
STAGES = {
    **dict.fromkeys(("lsd", "tvm", "tvm, shared"), (0, 1, 2)),
    **dict.fromkeys(("self_distillation", "self_distillation, full", "terminal_velocity"), (0, 2)),
    **dict.fromkeys(("lsd, differences", "tvm, differences"), (3,)),
    "online, differences": (2, 3),
    "features": (2, 3),
}


def network(dropout: float = 0.0) -> nn.Module:
    """A DiT without activation checkpointing whose every weight takes part."""
    torch.manual_seed(0)
    dit = partial(DiT, dim=16, depth=1, num_heads=2, patch=4, dropout=dropout)
    net = build_network(dit, Pictures().shape, Pictures().num_classes, ("u",))
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def trained(name: str, engine: Any, **more: Any) -> dict[str, Any]:
    dropout = 0.3 if "shared" in name else 0.0
    return found(
        *train(
            "mean_flow", engine, net=network(dropout), objective=CASES[name](),
            optimizer=Sgd(lr=0.02), **more,
        )
    )  # fmt: skip


def plain(name: str, shares: int = 2) -> dict[str, Any]:
    """One process, whose micro-batches have the dropout masks of the processes."""
    return trained(name, TorchEngine(gradient_accumulation_steps=shares))


def parity(folder: Path) -> dict[Any, Any]:
    results = {
        (stage, name): trained(name, ZeroEngine(stage=stage, **SMALL))
        for name, stages in STAGES.items()
        for stage in stages
    }
    for stage in (2, 3):
        where = folder / f"features{stage}"
        saving = [CheckpointCallback(every=2, keep=9)]
        engine = partial(ZeroEngine, stage=stage, **SMALL)
        trained("features", engine(), folder=where, callbacks=saving)
        steps = Budget(steps=4)
        results[stage, "resumed"] = trained(
            "features", engine(), folder=where, resume=True, budget=steps
        )
        results[stage, "whole"] = trained("features", engine(), budget=steps)
        names = [file.name for file in (where / "checkpoints" / "step_00000002").iterdir()]
        results[stage, "files"] = names
    return results


if __name__ == "__main__":
    main(globals())
