"""The contracts of a network, as objectives and samplers call it, and of the parts that make it.

at = (x, t, r, cond) -> trunk: features, c -> heads: raw readouts -> parametrisation: u, v
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from registry.protocols.batches import Cond

Network = Callable[[Tensor, Tensor, Tensor, Cond | None], dict[str, Tensor]]
"""net(x [b *d], t [b], r [b], cond) -> {"u": [b *d], "v": [b *d], "logvar": [b], ...}.

The heads decide which outputs there are. A network that has the velocity alone ignores r.
"""


@dataclass(frozen=True)
class Call:
    """One call of a network: its four arguments, and the outputs that are asked for."""

    x: Tensor  # [b *d]
    t: Tensor  # [b]
    r: Tensor  # [b]
    cond: Cond | None
    asked: tuple[str, ...] | None = None  # None asks for all

    def asks_for(self, key: str) -> bool:
        return self.asked is None or key in self.asked


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


@runtime_checkable
class BranchingTrunk(Trunk, Protocol):
    """A trunk of equal blocks, which can make more of them for one output alone.

    `branch(blocks)` is an nn.Module (features, c) -> features of so many new blocks.
    """

    def branch(self, blocks: int) -> torch.nn.Module: ...


class Head(Protocol):
    """An nn.Module built as `head(trunk)`: (features, c, at) -> {key: tensor} for its `keys`.

    `at` is the call of the network. `needs_r` says whether the outputs depend on the end r of the
    step. `velocities`, optional, names those of the keys that are velocities: u and v unless it
    says otherwise. Their tensors are raw readouts, from which the network's parametrisation makes
    the velocities. Every other key is an output as it is. A head may leave out the outputs that
    `at` does not ask for. One with arguments beside the trunk has them by name in `fields`, so that
    its network can be exported.
    """

    keys: ClassVar[tuple[str, ...]]
    needs_r: ClassVar[bool]

    def __call__(self, features: Tensor, c: Tensor, at: Call) -> dict[str, Tensor]: ...


class Parametrisation(Protocol):
    """What a readout means: (raw [b *d], key, at) -> the velocity [b *d] that it stands for.

    A frozen dataclass. It is called for the keys that the heads declare as velocities. For "u" the
    velocity is the average over [at.r, at.t], and for every other key the one at at.t. It is
    smooth in t and r, so that objectives can differentiate through it. `on_path`, optional, is the
    name of the path on which its equation holds; objectives with another path are refused.
    """

    def __call__(self, raw: Tensor, key: str, at: Call) -> Tensor: ...


@runtime_checkable
class Preconditioning(Protocol):
    """A parametrisation that also says with which x, t, r and cond the trunk is called.

    The heads, and the parametrisation itself, still see the call of the network.
    """

    def inputs(self, at: Call) -> Call: ...
