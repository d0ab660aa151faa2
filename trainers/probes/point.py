"""Where a derivative is probed: two rows for each input, and a perturbed copy of the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from registry.protocols import Cond, Derivative
from trainers.rng import generator
from zoo.ops import first_rows, like, normal_like, repeat_rows

# Exact derivatives of our backbones are right to 4e-6 in float32 (TF32 rounds at 5e-4) and to 1-6 %
# in bfloat16; cutting one branch of one block in twelve costs 15 % and more.
EXACT, REDUCED = 1e-2, 1e-1
APPROXIMATE = 1e-1  # differences at the default step are right to 1e-3
FLOAT32_REFERENCE = 5e-2  # differences in float32 are themselves right to about 1 %

TIMES = ((0.4, 0.0), (0.8, 0.3))  # (t, r), one row each
DIRECTIONS = ("x", "t", "r")


@torch.no_grad()
def perturbed(net: nn.Module, device: torch.device) -> nn.Module:
    """A copy on the device, with noise on its trainable weights."""
    net = copy.deepcopy(net).to(device)
    rng = generator(0, 0, 0, device)
    for p in net.parameters():
        if p.requires_grad and p.numel():
            add_noise(p, p.shape, rng)
    return net


def add_noise(held: Tensor, shape: Sequence[int], rng: torch.Generator) -> None:
    """Perturb a weight of this shape, or the piece of it that this process holds, in place.

    The noise is of scale 1 / sqrt(fan-in), or 0.1 on vectors, so that the network stays as smooth
    as it was when it was initialised.
    """
    scale = (shape[0] / math.prod(shape)) ** 0.5 if len(shape) > 1 else 0.1
    noise = torch.randn(held.shape, generator=rng, dtype=held.dtype, device=held.device)
    held.add_(scale * noise)


@dataclass(frozen=True)
class Point:
    """Where the output `key` is differentiated: the rows of TIMES for each of DIRECTIONS."""

    primals: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]
    cond: Cond | None
    key: str

    def derivative(self, by: Derivative, net: nn.Module, dtype: torch.dtype) -> Tensor:
        primals, tangents = ([v.to(dtype) for v in vs] for vs in (self.primals, self.tangents))
        return by(lambda x, t, r: net(x, t, r, self.cond)[self.key], primals, tangents)

    def with_graph(self, by: Any, net: nn.Module) -> Tensor:
        def outputs(x: Tensor, t: Tensor, r: Tensor) -> dict[str, Tensor]:
            return dict(net(x, t, r, self.cond))

        derivative: Tensor = by.with_graph(outputs, self.primals, self.tangents, self.key)[1]
        return derivative

    def output(self, net: nn.Module) -> Tensor:
        return net(*self.primals, self.cond)[self.key]


@dataclass(frozen=True)
class Expected:
    """The derivative by differences, and the sizes [rows] that its errors are relative to."""

    value: Tensor
    size: Tensor

    @property
    def suffix(self) -> str:
        return "" if self.value.dtype == torch.float64 else "_float32"


def point_on_path(x0: Tensor, cond: Cond | None, key: str) -> Point:
    """The point, which lies on the straight path from data to noise."""
    k, n = len(TIMES), len(DIRECTIONS)
    x0, (t, r) = torch.cat([x0[:k]] * n), torch.tensor(TIMES * n, device=x0.device).T
    x1 = normal_like(x0, generator(0, 0, 1, x0.device))  # all rows differ, even if they are sorted
    primals = (x0 + like(t, x0) * (x1 - x0), t, r)
    moves = (x1 - x0, torch.ones_like(t), torch.ones_like(r))
    of_rows = torch.arange(n, device=x0.device).repeat_interleave(k)
    tangents = tuple(move * like(of_rows == i, move) for i, move in enumerate(moves))
    return Point(primals, tangents, repeat_rows(first_rows(cond, k), n), key)


def bound_of(part: Derivative, net: nn.Module, expected: Expected) -> float:
    """The largest error that a derivative may have, in the precision of its pass."""
    weights = {p.dtype for p in net.parameters()}
    device = expected.value.device.type
    reduced = torch.is_autocast_enabled(device) or weights & {torch.bfloat16, torch.float16}
    bound = (REDUCED if reduced else EXACT) if part.needs_forward_ad else APPROXIMATE
    return max(bound, FLOAT32_REFERENCE) if expected.suffix else bound


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


NO_RULE = (
    "An operation in it has no forward-mode rule, such as fused attention that is not torch's "
    "scaled_dot_product_attention, an autograd.Function without jvp, or reentrant checkpointing. "
    "Take its plain form (attention: the math kernel), give it a rule, or choose "
    "@finite_difference()."
)
