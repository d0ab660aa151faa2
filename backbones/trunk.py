"""The base class of this package's trunks, and activation checkpointing of their blocks.

The contract of a trunk is registry.protocols.Trunk. A `TrunkModule` also records the arguments that
it was made with, so that an exported network can be made again without gin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TrunkModule(nn.Module):
    """An nn.Module whose `fields` are the arguments that it was made with, defaults included."""

    fields: dict[str, Any]

    def __new__(cls, *_: Any, **given: Any) -> Self:
        made = super().__new__(cls)
        parameters = inspect.signature(cls.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        made.__dict__["fields"] = {**defaults, **given}
        return made


class Branch(nn.Module):
    """Blocks (features, c) -> features, one after the other."""

    def __init__(self, blocks: Iterable[nn.Module], checkpointing: bool = False):
        super().__init__()
        self.blocks, self.checkpointing = nn.ModuleList(blocks), checkpointing

    def forward(self, features: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            features = through(block, self.checkpointing, features, c)
        return features


def through(block: nn.Module, checkpointing: bool, *inputs: Tensor) -> Tensor:
    """block(*inputs); with `checkpointing` the backward pass recomputes the block's activations."""
    if checkpointing and torch.is_grad_enabled():
        fixed = [p for p in block.parameters() if not p.requires_grad]
        again: dict[str, Any] = (
            {} if block.training and not fixed else {"context_fn": _as_now(block, fixed)}
        )
        recomputed: Tensor = checkpoint(block, *inputs, use_reentrant=False, **again)
        return recomputed
    out: Tensor = block(*inputs)
    return out


def _as_now(
    block: nn.Module, fixed: Sequence[nn.Parameter]
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """For a target with a gradient to its inputs, which changes the block in its forward alone.

    In the backward pass the block is computed again in the mode of the forward, and weights that
    took no gradient there take none.
    """
    training = block.training

    @contextmanager
    def recomputation() -> Iterator[None]:
        mode, moving = block.training, [p for p in fixed if p.requires_grad]
        block.train(training)
        for p in moving:
            p.requires_grad_(False)
        try:
            yield
        finally:
            block.train(mode)
            for p in moving:
                p.requires_grad_(True)

    return lambda: (nullcontext(), recomputation())


def check_decoder(name: str, decoder_from: int | None, depth: int) -> None:
    """ValueError unless there are blocks before this one, which see t, and it exists, to see r."""
    if decoder_from is not None and not 0 < decoder_from < depth:
        raise ValueError(
            f"{name}.decoder_from = {decoder_from} is the first block that sees r, of {depth} "
            f"blocks from 0 on; it must be from 1 to {depth - 1}"
            if depth > 1
            else f"{name}.decoder_from needs two blocks or more, and {name}.depth = {depth}"
        )


Trunk = TrunkModule  # the name in 0.1, from which plug-ins may inherit
