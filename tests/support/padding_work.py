"""What the processes of test_zero_padding.py do: `python padding_work.py NAME FOLDER`.

DeepSpeed pads what it cuts, and never writes the padding. Here it is filled with NaN first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zero_toys import Pictures, Watch
from zero_work import STAGES, main

import zoo  # noqa: F401  registers the objectives
from backbones.mlp import MLP
from backbones.network import build_network
from trainers import AdamW, Budget, Callback, CheckpointCallback, TrainState, fit, ranks
from trainers.checkpoints.checkpoint import checkpoints, latest
from trainers.ema.snapshots import EmaSnapshots
from trainers.sharding import gathered_state, is_sharded, shape_of, state_pieces
from trainers.zero.engine import ZeroEngine
from zoo.objectives.mean_flow import MeanFlow

STEPS, DECAYS, SIGMA_RELS = 3, (0.5,), (0.05,)


class Poison(Callback):
    """Fill all padding of this process with NaN; `filled` counts its elements."""

    filled = 0

    def on_start(self, state: TrainState) -> None:
        engine: Any = state.engine
        for param in engine.module.parameters():
            if is_sharded(param):
                piece = param.ds_tensor.data.view(-1)
                begin = min(ranks.number() * len(piece), math.prod(shape_of(param)))
                self._fill(piece[math.prod(shape_of(param)) - begin :])
        places = list(state_pieces(engine.module, engine._optimizer))
        for flat in {place.flat for place in places}:
            padding = torch.ones(flat.numel(), dtype=torch.bool)
            for place in places:
                if place.flat is flat:
                    padding[place.place] = False
            with torch.no_grad():
                flat.view(-1)[padding] = torch.nan
            self.filled += int(padding.sum())

    def _fill(self, padding: torch.Tensor) -> None:
        padding.fill_(torch.nan)
        self.filled += len(padding)


def network() -> nn.Module:
    """Sizes of 17, 7 and 1, which neither two nor four processes divide."""
    torch.manual_seed(0)
    net = build_network(
        lambda *shape, **given: MLP(*shape, dim=17, depth=2, **given), (7,), 3, ("u",)
    )
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net


def go(engine: Any, folder: Path | None, *callbacks: Callback, **changes: Any) -> dict[str, Any]:
    """Train the network of odd sizes; what every process sees, and what the leader gathers."""
    watch = Watch()
    given: dict[str, Any] = {
        "net": network(),
        "objective": MeanFlow(),
        "dataset": Pictures(shape=(7,)),
        "batch_size": 8,
        "budget": Budget(steps=STEPS),
        "optimizer": AdamW(lr=1e-2, weight_decay=0.1),
        "ema_decays": DECAYS,
        "power_emas": SIGMA_RELS,
        "engine": engine,
    }
    state = fit(**given | changes, folder=folder, callbacks=[*callbacks, watch])
    return {
        "losses": watch.losses,
        "norms": watch.norms,
        "module": gathered_state(state.engine.module),  # type: ignore[attr-defined]
    }


def poisoned(folder: Path) -> dict[Any, Any]:
    """Every stage with checkpoints and snapshots, then resumed from the second step."""
    results: dict[Any, Any] = {}
    for stage in STAGES:
        where, poison = folder / f"stage{stage}", Poison()
        snapshots = EmaSnapshots(sigma_rels=SIGMA_RELS, count=1)
        saving = CheckpointCallback(every=1, keep=STEPS)
        engine = ZeroEngine(stage=stage, max_grad_norm=0.5)
        results[stage] = go(engine, where, poison, snapshots, saving)
        results[stage]["filled"] = sum(ranks.gathered(poison.filled))
        results[stage]["saved"] = [path.name for path in checkpoints(where / "checkpoints")]
        results[stage]["newest"] = latest(where / "checkpoints")
        results[stage]["resumed"] = go(
            ZeroEngine(stage=stage, max_grad_norm=0.5), where, poison,
            budget=Budget(steps=STEPS + 1), resume=True,
        )  # fmt: skip
    return results


if __name__ == "__main__":
    main(globals())
