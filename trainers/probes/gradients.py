"""Whether the gradient of a derivative is right, where the objective trains its derivative.

Three numbers, one for each input that moves, are made of the derivative. Their gradients along a
few directions of all weights are compared with central differences of a float64 copy, which need
values alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from registry.protocols import Derivative
from trainers.probes.point import (
    DIRECTIONS,
    NO_RULE,
    Expected,
    Point,
    add_noise,
    bound_of,
    dtype_name,
)
from trainers.rng import generator
from zoo.derivatives.methods import FiniteDifference
from zoo.derivatives.trained import by_differences, by_gradient, trained_weights
from zoo.ops import normal_like

# Steps of the inputs and of the weights. The error is of the square of the step by truncation, and
# of the rounding over that square: 1e-8 each in float64.
STEP_OF_BOTH = {torch.float64: 1e-4, torch.float32: 1e-2}
WEIGHT_MOVES = 3


def gradient_error(
    part: Derivative, net: nn.Module, point: Point, expected: Expected, subject: str
) -> float:
    """The largest error of the derivative's gradient; ValueError above the bound."""
    rng = generator(0, 0, 2, expected.value.device)
    cotangent = normal_like(expected.value, rng) / expected.value[0].numel() ** 0.5
    number_of = partial(_sums, cotangent=cotangent)
    moves = partial(_moves, net)
    try:
        with torch.enable_grad():
            value = point.with_graph(part, net)
            found = by_gradient(number_of(value), net, moves, WEIGHT_MOVES)
    except CheckpointError as error:
        raise ValueError(
            f"{subject} cannot be trained with activation checkpointing. {SAVING}"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"{subject} cannot be trained on this network: {str(error).splitlines()[0]}\n{NO_RULE}"
        ) from error
    step, dtype = STEP_OF_BOTH[expected.value.dtype], expected.value.dtype
    wide = copy.deepcopy(net).to(dtype)

    def numbers() -> Tensor:
        return number_of(point.derivative(FiniteDifference(step=step), wide, dtype))

    wanted = by_differences(numbers, wide, moves, WEIGHT_MOVES, step)
    sizes = wanted.square().mean(1).sqrt()
    errors = (found - wanted).square().mean(1).sqrt() / sizes.maximum(sizes.max() / 100)
    worst, direction = errors.max(0)
    bound = 2 * bound_of(part, net, expected)
    if not worst <= bound:
        raise ValueError(
            f"{subject} has a wrong gradient on this network: of the derivative along "
            f"{DIRECTIONS[int(direction)]} its relative error is {float(worst):.2g}, more than "
            f"{bound:g}, against central differences in {dtype_name(dtype)}.\n{NOT_TRAINED}"
        )
    return float(worst)


def _sums(value: Tensor, *, cotangent: Tensor) -> Tensor:
    """One number for each direction of the inputs, [3]: a weighted sum of the derivative."""
    return (cotangent.to(value.dtype) * value).flatten(1).sum(1).unflatten(0, (3, -1)).sum(1)


def _moves(net: nn.Module, number: int) -> Iterator[Tensor]:
    """Direction `number` of all weights, weight by weight, of the size of `add_noise`."""
    for i, p in enumerate(trained_weights(net)):
        move = torch.zeros(p.shape, device=p.device)
        add_noise(move, p.shape, generator(2 + number, 0, i, p.device))
        yield move


SAVING = (
    "Its blocks are computed again when the derivative has ended. Set checkpointing = False of the "
    "backbone, or choose @finite_difference(), whose passes are ordinary ones."
)
NOT_TRAINED = (
    "Something in the network keeps the gradient of the derivative from the weights: a detached "
    "tangent, or an operation that torch differentiates in forward mode and not twice. Mend it, or "
    "choose @finite_difference()."
)
