"""Weights and optimizer states as files.

Loading executes nothing: weights are safetensors, the optimizer is read with `weights_only`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.pretrained.tensors import UnreadableTensors, load_into, save_tensors
from trainers import ranks
from trainers.checkpoints.whole_files import whole_file
from trainers.checkpoints.whole_folders import BrokenCheckpoint
from trainers.sharding import gathered_state


def save_module(path: Path, module: nn.Module) -> None:
    """A module's weights as a whole safetensors file, by the leading process; OSError if it fails.

    Every process must call it, since each may hold pieces of them.
    """
    tensors = gathered_state(module)
    if ranks.leads():
        with whole_file(path) as partial:
            save_tensors(partial, tensors)


def load_module(path: Path, module: nn.Module) -> None:
    """As `load_into`; BrokenCheckpoint for a file that is not a safetensors file."""
    try:
        load_into(path, module)
    except UnreadableTensors as problem:
        raise BrokenCheckpoint(str(problem)) from problem


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """An optimizer's state; OSError if it cannot be written."""
    try:
        torch.save(state, path)
    except RuntimeError as problem:  # what torch's file writer raises
        raise OSError(f"{path} cannot be written: {problem}") from problem


def copied(tensor: Tensor) -> Tensor:
    """A copy in the memory of the host, which training does not change."""
    return tensor.detach().to("cpu", copy=True)


def copied_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with copies of its tensors in the memory of the host."""
    kept = {
        number: {k: copied(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": kept}


def read_state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
