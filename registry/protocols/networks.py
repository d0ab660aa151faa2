"""The contracts of a network, as objectives and samplers call it, and of its trunk and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from registry.protocols.batches import Cond

Network = Callable[[Tensor, Tensor, Tensor, Cond | None], dict[str, Tensor]]
"""net(x [b *d], t [b], r [b], cond) -> {"u": [b *d], "v": [b *d], "logvar": [b], ...}.

The heads decide which outputs there are. A network that has the velocity alone ignores r.
"""


class Trunk(Protocol):
    """The body of a network that its heads share, an nn.Module: (x, t, r, cond) -> (features, c).

    It is built as `trunk(shape=(channels, *size), num_classes=k, two_times=...)`. `readout()` makes
    a new output layer (features, c) -> [b *d] that is zero at initialisation. `pool(features)`
    gives [b dim].
    """

    dim: int

    def __call__(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None
    ) -> tuple[Tensor, Tensor]: ...
    def readout(self) -> torch.nn.Module: ...
    def pool(self, features: Tensor) -> Tensor: ...


class Head(Protocol):
    """An nn.Module built as `head(trunk)`: (features, c) -> {key: tensor} for each of its `keys`.

    `needs_r` says whether its outputs depend on the end r of the step.
    """

    keys: ClassVar[tuple[str, ...]]
    needs_r: ClassVar[bool]

    def __call__(self, features: Tensor, c: Tensor) -> dict[str, Tensor]: ...
