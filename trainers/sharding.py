"""Finds this process's part of the weights and of the optimizer state under ZeRO, as views.

    stage 0     weights and optimizer state whole in every process
    stages 1-2  weights whole; state in flat partitions over all weights, cut anywhere
    stage 3     weights and state in equal pieces of each weight, the last one padded

A `Piece` is a contiguous range of one flattened tensor. Code that reads or writes pieces need not
know the stage. Where they lie is in private attributes of DeepSpeed, so pyproject.toml limits its
version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainers import ranks


@dataclass(frozen=True)
class Piece:
    """Elements start .. start + len(view) - 1 of a flattened tensor; `view` shares their memory."""

    name: str
    start: int
    view: Tensor
    everywhere: bool = False  # every process holds the same elements


@dataclass(frozen=True)
class StatePiece:
    """Where a weight's piece lies in a flat tensor, under which the optimizer keeps its state."""

    name: str
    start: int
    flat: nn.Parameter
    place: slice
    everywhere: bool = False

    def of(self, tensor: Tensor) -> Piece:
        view = tensor.detach().view(-1)[self.place]
        return Piece(self.name, self.start, view, self.everywhere)


def is_sharded(param: Tensor) -> bool:
    """Whether stage 3 keeps this parameter in pieces; its `data` is empty between uses."""
    return hasattr(param, "ds_tensor")


def shape_of(param: Any) -> tuple[int, ...]:
    return tuple(param.ds_shape if is_sharded(param) else param.shape)


def weight_pieces(module: nn.Module) -> Iterator[Piece]:
    params: Iterable[tuple[str, Any]] = module.named_parameters()
    for name, param in params:
        if is_sharded(param):
            yield Piece(name, _range(param)[0], _own(param))
        else:
            yield Piece(name, 0, param.data.view(-1), everywhere=True)


def state_pieces(module: nn.Module, optimizer: Any) -> Iterator[StatePiece]:
    """The pieces of all trainable weights; `optimizer` is what deepspeed.initialize returned."""
    params: Iterable[tuple[str, Any]] = module.named_parameters()
    for name, param in params:
        if not param.requires_grad:
            continue
        if is_sharded(param):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
            start, length = _range(param)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield StatePiece(name, start, flat, slice(offset, offset + length))
        elif not hasattr(optimizer, "single_partition_of_fp32_groups"):
            yield StatePiece(name, 0, param, slice(0, param.numel()), everywhere=True)
        elif (mapping := param._hp_mapping) is not None:
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            here = mapping.hp_fragment_address
            place = slice(here.start, here.start + here.numel)
            yield StatePiece(name, mapping.lp_fragment_address.start, flat, place)


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def refresh_masters(module: nn.Module, optimizer: Any) -> None:
    """Copy the weights to the float32 copies that the optimizer updates."""
    weights = {piece.name: piece for piece in weight_pieces(module)}
    for piece in state_pieces(module, optimizer):
        master, held = piece.of(piece.flat), weights[piece.name]
        offset = master.start - held.start
        master.view.copy_(held.view[offset : offset + len(master.view)])


@contextmanager
def shards(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block a parameter's data is this process's piece of it, without padding.

    So arithmetic by elements works on sharded weights.
    """
    params: list[Any] = [p for p in module.parameters() if is_sharded(p)]
    for p in params:
        if p.data.numel():
            p.partition()  # else a gathered copy would keep the old values
    kept = [p.data for p in params]
    try:
        for p in params:
            p.data = _own(p)
        yield
    finally:
        for p, data in zip(params, kept, strict=True):
            p.data = data


def gathered_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's whole state on the CPU of the leading process, one weight at a time.

    Every process must call it; the others get an empty dictionary.
    """
    params: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    found = {}
    for name, value in module.state_dict().items():
        if name in params and is_sharded(params[name]):
            value = whole(params[name])
        if ranks.leads():
            found[name] = value.detach().cpu()
    return found


def whole(param: Any) -> Tensor:
    """A copy on the CPU; every process must call it for a sharded parameter."""
    if not is_sharded(param):
        return param.detach().cpu().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().cpu().clone()


def _own(param: Any) -> Tensor:
    """The elements of a sharded parameter that this process holds.

    DeepSpeed never writes the padding after them, so it may hold any bits, even NaN.
    """
    own: Tensor = param.ds_tensor.data.view(-1)[: _range(param)[1]]
    return own


def _range(param: Any) -> tuple[int, int]:
    """Where this process's piece of a sharded parameter starts, and its length without padding."""
    size = param.ds_tensor.numel()
    start = min(ranks.number() * size, param.ds_numel)
    return start, min(size, param.ds_numel - start)
