"""DeepSpeed ZeRO without its processes: what it is given, pieces of tensors, the loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from zero_work import train

from trainers import TorchEngine
from trainers.checkpoints.whole_folders import BrokenCheckpoint
from trainers.sharding import Piece
from trainers.zero.checkpoint import Pieces
from trainers.zero.engine import ZeroEngine
from trainers.zero.loss_scale import LossScale

# --- what DeepSpeed is given


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"stage": 4}, r"zero_engine.stage = 4; allowed: 0, 1, 2, 3"),
        ({"precision": "fp8"}, r"zero_engine.precision = 'fp8'; allowed: 'fp32', 'bf16', 'fp16'"),
        ({"max_grad_norm": -1.0}, r"zero_engine.max_grad_norm"),
        ({"timeout_minutes": 0}, r"zero_engine.timeout_minutes = 0 must be above 0"),
        ({"gradient_accumulation_steps": 0}, r"zero_engine.gradient_accumulation_steps"),
        ({"stage": 0, "offload_optimizer": True}, r"needs zero_engine.stage = 1 or more"),
        ({"stage": 2, "offload_param": True}, r"needs zero_engine.stage = 3 or more"),
        ({"without_exact": "hope"}, r"allowed: 'refuse', 'finite_difference'"),
    ],
)
def test_zero_engine_refuses_what_it_cannot_do(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ZeroEngine(**wrong)


def test_config_writes_what_deepspeed_would_otherwise_choose() -> None:
    config = ZeroEngine(stage=3, gradient_accumulation_steps=2).deepspeed_config(24, processes=4)
    assert config["gradient_clipping"] == 0.0  # absent, it is 1.0
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["zero_optimization"]["memory_efficient_linear"] is False
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    with pytest.raises(ValueError, match="run.batch_size must be a multiple of 8"):
        ZeroEngine(gradient_accumulation_steps=2).deepspeed_config(12, processes=4)


def test_torch_engine_says_which_engine_takes_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trainers.ranks.count", lambda: 2)
    with pytest.raises(ValueError, match=r"zero2.gin"):
        train("flow_matching", TorchEngine())


# --- pieces


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=5),
    wanted=st.tuples(st.integers(0, 29), st.integers(1, 30)),
)
@settings(max_examples=25)
def test_pieces_are_read_whatever_the_cuts_were(
    tmp_path_factory: pytest.TempPathFactory, sizes: Any, cuts: Any, wanted: Any
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    whole = {f"w{i}": torch.randn(n) for i, n in enumerate(sizes)}
    edges = [0, *sorted(cuts), 30]
    for rank, (a, b) in enumerate(pairwise(edges)):
        _write(folder, rank, {name: (a, value[a:b]) for name, value in whole.items()})
    with Pieces(folder) as pieces:
        for name, value in whole.items():
            a = min(wanted[0], len(value) - 1)
            into = torch.zeros(len(value[a : a + wanted[1]]))
            pieces.fill(Piece(name, a, into))
            assert torch.equal(into, value[a : a + wanted[1]])


def test_pieces_that_lack_an_element_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, 0, {"w": (0, torch.zeros(3))})
    _write(tmp_path, 1, {"w": (4, torch.zeros(3))})
    with Pieces(tmp_path) as pieces, pytest.raises(BrokenCheckpoint, match="6 of 7 elements of w"):
        pieces.fill(Piece("w", 0, torch.zeros(7)))


def _write(folder: Path, rank: int, pieces: Mapping[str, tuple[int, Tensor]]) -> None:
    import json

    starts = {name: start for name, (start, value) in pieces.items() if len(value)}
    tensors = {name: pieces[name][1].clone() for name in starts}
    path = folder / f"rank_{rank:05d}.safetensors"
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})


# --- parts


def test_loss_scale_halves_after_an_overflow_and_counts_it_as_no_step() -> None:
    scale = LossScale()
    first = scale.value
    assert scale.follow(torch.tensor(2.0)) == 2.0
    assert scale.follow(torch.tensor(float("inf"))) == 0.0
    assert scale.value == first / 2
    assert torch.equal(scale.undo(torch.tensor(scale.value)), torch.tensor(1.0))
    while scale.value > 1:
        scale.follow(torch.tensor(float("nan")))
    assert not scale.follow(torch.tensor(float("nan"))).isfinite()  # no scale helps: told
