"""Weights and optimizer states as files.

Loading executes nothing: weights are safetensors, the optimizer is read with `weights_only`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.pretrained.tensors import (
    UnreadableTensors,
    fitting,
    load_into,
    save_tensors,
)
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


def read_module(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """A module's weights from a file, not yet put into it; BrokenCheckpoint if they do not fit."""
    try:
        return fitting(path, module)
    except OSError as problem:
        raise BrokenCheckpoint(f"{path} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
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
    """The state that `save_state` wrote; BrokenCheckpoint for any other content."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # whatever torch's reader meets in bytes that are no state
        raise BrokenCheckpoint(
            f"{path} holds no optimizer's state, or more than numbers; nothing in it was executed"
        ) from problem
    if not isinstance(state, dict):
        raise BrokenCheckpoint(f"{path} holds no optimizer's state")
    return state


def check_state(path: Path, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """BrokenCheckpoint unless the state read from `path` fits the optimizer's weights."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    values = state.get("state")
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise BrokenCheckpoint(f"{path} has no state of weights")
    if unknown := sorted(map(repr, values.keys() - set(range(len(weights))))):
        raise BrokenCheckpoint(
            f"{path} has a state of weight {unknown[0]}; the network has {len(weights)} weights"
        )
    kept = kept_by(optimizer)
    for number, entry in values.items():
        if entry.keys() != kept:
            raise BrokenCheckpoint(
                f"{path} keeps {_listed(entry)} of weight {number}; "
                f"{type(optimizer).__name__} keeps {_listed(kept)}"
            )
        for key, value in entry.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if shape not in ((), tuple(weights[number].shape)):
                raise BrokenCheckpoint(
                    f"{path} has {key} of shape {shape} for weight {number}, which has shape "
                    f"{tuple(weights[number].shape)}"
                )


def kept_by(optimizer: torch.optim.Optimizer) -> set[str]:
    """The names of what the optimizer keeps of a weight, from a step of one like it."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    like = type(optimizer)([{**options, "params": [weight]}])  # type: ignore[call-arg]
    like.step()
    return set(like.state[weight])


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"
