"""What the processes of tests/trainers/ema/test_post_hoc_ema.py do; see zero_work.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import zero_work
from trainer_toys import StopAt
from zero_toys import Sgd
from zero_work import SMALL, train

from backbones.pretrained.tensors import save_tensors
from trainers import Budget, CheckpointCallback, TrainState, ranks
from trainers.ema import snapshots
from trainers.ema.snapshots import EmaSnapshots
from trainers.sharding import gathered_state, is_sharded, shape_of
from trainers.zero.engine import ZeroEngine

WIDTHS = (0.05, 0.1)


def go(engine: Any, folder: Path, *more: Any, resume: bool = False) -> dict[str, Any]:
    """Five steps with four snapshots: after steps 2, 3, 4 and 5."""
    state, _ = train(
        "flow_matching", engine, optimizer=Sgd(lr=0.1), budget=Budget(steps=5),
        folder=folder, resume=resume, ema_decays=(), power_emas=WIDTHS,
        callbacks=[EmaSnapshots(sigma_rels=WIDTHS, count=4), CheckpointCallback(), *more],
    )  # fmt: skip
    emas = {name: gathered_state(ema) for name, ema in state.emas.items()}
    return {"emas": emas, "share": _share(state)}


def _share(state: TrainState) -> float:
    """The largest share of all averages that a process holds."""
    params = [p for ema in state.emas.values() for p in ema.parameters()]
    held = sum(p.ds_tensor.numel() if is_sharded(p) else 0 for p in params)
    held += sum(p.data.numel() for p in params)
    return max(ranks.gathered(held / sum(math.prod(shape_of(p)) for p in params)))


def sharded(folder: Path) -> dict[str, Any]:
    told = {
        "2": go(ZeroEngine(stage=2, gradient_accumulation_steps=2), folder / "2"),
        "3": go(ZeroEngine(stage=3, **SMALL), folder / "3"),
    }
    stopped = folder / "resumed"
    go(ZeroEngine(stage=3, **SMALL), stopped, StopAt(3))
    told["resumed"] = go(ZeroEngine(stage=3, **SMALL), stopped, resume=True)
    snapshots.save_tensors = _full_at_step_3  # type: ignore[assignment]
    told["full"] = go(ZeroEngine(stage=3, **SMALL), folder / "full")
    return told


def _full_at_step_3(path: Path, tensors: Any) -> None:
    """Of the leader, before the last of the gathers that all take part in."""
    if path.parent.name == ".step_00000003.partial":
        raise OSError(28, "No space left on device")
    save_tensors(path, tensors)


if __name__ == "__main__":
    zero_work.main(globals())
