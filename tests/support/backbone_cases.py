"""A small network of every registered backbone, for the tests of backbones and heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import registry
from backbones import FlowNetwork, build_network
from registry.protocols import Parametrisation

SMALL = {
    "dit": ((3, 4, 6), {"dim": 32, "depth": 2, "num_heads": 2}),
    "lightning_dit": ((3, 4, 6), {"dim": 32, "depth": 2, "num_heads": 2, "patch": 2}),
    "unet": ((3, 5, 7), {"channels": 8, "num_heads": 2}),
    "ddpmpp": ((3, 4, 6), {"channels": 8, "multipliers": (2, 2), "blocks": 1}),
    "mlp": ((3,), {"dim": 32, "depth": 2}),
}
NUM_CLASSES = 4


def small(
    backbone: str,
    keys: tuple[str, ...] = ("u",),
    *,
    heads: tuple[type, ...] | None = None,
    num_classes: int = NUM_CLASSES,
    seed: int = 0,
    parametrisation: Parametrisation | None = None,
    **fields: Any,
) -> FlowNetwork:
    """As built; a registered backbone without an entry in SMALL fails here."""
    shape, defaults = SMALL[backbone]
    torch.manual_seed(seed)
    made = partial(registry.backbones.get(backbone), **{**defaults, **fields})
    return build_network(made, shape, num_classes, keys, heads, parametrisation)


def awake(net: FlowNetwork, scale: float = 0.1) -> FlowNetwork:
    """The same network away from its start, where nothing is zero any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += scale * torch.randn_like(parameter)
    return net


def inputs(
    backbone: str, n: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """x, t, r < t and labels, with one NULL_LABEL."""
    torch.manual_seed(2)
    x = torch.randn(n, *SMALL[backbone][0], dtype=dtype)
    t = 0.2 + 0.8 * torch.rand(n, dtype=dtype)
    r = t * torch.rand(n, dtype=dtype)
    return x, t, r, {"label": torch.arange(n) % (NUM_CLASSES + 1) - 1}
