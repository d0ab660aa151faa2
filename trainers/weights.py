"""Weights and optimizer states as files. Loading executes nothing: weights are safetensors, the
optimizer is read with `weights_only`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers import ranks
from trainers.folders import BrokenCheckpoint
from trainers.zero_shards import gathered_state


def save_module(path: Path, module: nn.Module) -> None:
    """A module's weights as safetensors, by the leading process; OSError if they cannot be written.

    Every process must call it, since each may hold pieces of them.
    """
    tensors = gathered_state(module)
    if ranks.leads():
        save_tensors(path, tensors)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """As safetensors; OSError if they cannot be written."""
    unshared: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.contiguous()
        if value.data_ptr() in seen:  # safetensors has no shared storage
            value = value.clone()
        seen.add(value.data_ptr())
        unshared[name] = value
    try:
        save_file(unshared, path, metadata)
    except SafetensorError as problem:
        raise OSError(f"{path} cannot be written: {problem}") from problem


def load_module(path: Path, module: nn.Module) -> None:
    """Load weights that fit the module exactly; ValueError naming what differs."""
    if not path.is_file():
        there = sorted(f.name for f in path.parent.glob("*.safetensors"))
        raise ValueError(f"{path} is missing; there are: {', '.join(there) or 'no weights'}")
    try:
        tensors = load_file(path)
    except SafetensorError as problem:
        raise BrokenCheckpoint(f"{path} is no safetensors file: {problem}") from problem
    check_fit(
        path,
        {name: tuple(value.shape) for name, value in tensors.items()},
        {name: tuple(value.shape) for name, value in module.state_dict().items()},
    )
    module.load_state_dict(tensors)


def check_fit(
    path: Path, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError unless the shapes of saved weights are those of the network."""
    differences = [f"{name} is missing" for name in here.keys() - there.keys()]
    differences += [f"{name} is unknown here" for name in there.keys() - here.keys()]
    differences += [
        f"{name} has shape {there[name]}, here {shape}"
        for name, shape in here.items()
        if name in there and there[name] != shape
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5]) + ("; ..." if len(differences) > 5 else "")
        raise ValueError(
            f"{path} does not fit this network in {len(differences)} of {len(here)} tensors: "
            f"{shown}. Use the backbone, heads and data shape that it was made with"
        )


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """An optimizer's state; OSError if it cannot be written."""
    try:
        torch.save(state, path)
    except RuntimeError as problem:  # what torch's file writer raises
        raise OSError(f"{path} cannot be written: {problem}") from problem


def copied(tensor: Tensor) -> Tensor:
    """In the memory of the host, where training does not change it."""
    return tensor.detach().to("cpu", copy=True)


def copied_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state, likewise."""
    kept = {
        number: {k: copied(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": kept}


def read_state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
