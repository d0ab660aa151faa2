"""What the trunks of this package have in common: they know what they were made with, and may
recompute their blocks in the backward pass.

An exported network is made again from that record, without gin.
"""

from __future__ import annotations

import inspect
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


def through(block: nn.Module, checkpointing: bool, *inputs: Tensor) -> Tensor:
    """block(*inputs); with `checkpointing` its activations are not kept but computed again."""
    if checkpointing and torch.is_grad_enabled():
        recomputed: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return recomputed
    out: Tensor = block(*inputs)
    return out
