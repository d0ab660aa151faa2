"""The gradient of a derivative by the weights, and differences that it can be compared with.

A derivative that is trained can be right and its gradient wrong: a tangent that was detached
somewhere, or a rule whose own derivative is missing. So a number made of the derivative is moved
with the weights, along a few random directions in the space of all weights. The differences are
central, of derivatives that are central differences of values: they need values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Numbers = Callable[[], Tensor]  # numbers [n], a function of the weights
Moves = Callable[[int], Iterator[Tensor]]  # number of a direction -> a move of each trained weight


def by_gradient(numbers: Tensor, net: nn.Module, moves: Moves, count: int) -> Tensor:
    """How the numbers [n] change along each direction, [n count], by their gradients."""
    weights = trained_weights(net)
    found = []
    for number in numbers:
        gradients = torch.autograd.grad(
            number, weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        found.append([_product(gradients, moves(i)) for i in range(count)])
    return torch.stack([torch.stack(row) for row in found])


@torch.no_grad()
def by_differences(
    numbers: Numbers, net: nn.Module, moves: Moves, count: int, step: float
) -> Tensor:
    """The same by central differences; the weights of `net` are moved and moved back."""
    weights = trained_weights(net)

    def move(i: int, by: float) -> None:
        for weight, direction in zip(weights, moves(i), strict=True):
            weight.add_(direction.to(weight.dtype), alpha=by)

    found = []
    for i in range(count):
        move(i, step)
        ahead = numbers()
        move(i, -2 * step)
        behind = numbers()
        move(i, step)
        found.append((ahead - behind) / (2 * step))
    return torch.stack(found, 1)


def trained_weights(net: nn.Module) -> Sequence[Tensor]:
    return [p for p in net.parameters() if p.requires_grad and p.numel()]


def _product(gradients: Sequence[Tensor], moves: Iterator[Tensor]) -> Tensor:
    pairs = zip(gradients, moves, strict=True)
    return torch.stack([(g.double() * move.double()).sum() for g, move in pairs]).sum()
