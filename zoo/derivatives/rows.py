"""Whether the rows of a batch may pass a network apart from one another.

An objective that differentiates some of its rows lets them pass the network apart from the others.
A network whose rows depend on one another, by a batch norm in training or by sorting or normalising
over the batch, would then see two other batches, and give other values and another derivative.

So some of the rows are moved alone. Their derivative must be as with all rows moved, and that of
the others zero. The test is exact for every operation that forward mode follows. It misses a
dependence without derivative, such as a choice by argmax, and one that is multiplied by zero, as in
layers that start at zero.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from zoo.derivatives.dual_tensors import EagerRecord, rule_of
from zoo.derivatives.dual_tensors.refusals import name_of
from zoo.derivatives.dual_tensors.tensor import JvpFn, JvpRule, TangentRef, listed

SLACK = 1e-3  # differences are as exact as their kernels repeat themselves

COUPLED = (
    "rows that take a derivative pass the network apart from the others, so that a batch norm in "
    "training, or sorting or normalising over the batch, would see another batch. Normalise within "
    "each row (layer_norm, group_norm), put batch norms into evaluation mode, or take the "
    "derivative of every row (off_diagonal_fraction = 1)"
)


def has_values(x: Tensor) -> bool:
    """Whether a tensor holds numbers, unlike one that stands for its shape alone."""
    return x.device.type != "meta" and detect_fake_mode((x,)) is None


def some_rows(n: int) -> Tensor:
    """Which of n rows are moved [n]: a half of them, so that no simple pattern is kept."""
    moved = torch.zeros(n, dtype=torch.bool)
    moved[torch.randperm(n, generator=torch.Generator().manual_seed(0))[: (n + 1) // 2]] = True
    return moved


def rows_meet(whole: Tensor, part: Tensor, moved: Tensor) -> bool:
    """Whether rows depend on one another.

    `whole` [n ...] is the derivative with all rows moved, and `part` that with the rows `moved`
    alone, which must be the same in these rows and zero in the others. A nan decides nothing.
    """
    whole, part = (d.detach().reshape(len(moved), -1) for d in (whole, part))
    error = part - torch.where(moved[:, None], whole, torch.zeros_like(whole))
    return bool(error.abs().amax() > SLACK * whole.abs().amax())


class WatchedRecord(EagerRecord):
    """Each tangent with a second one beside it, which moves `some_rows` of the inputs alone."""

    def __init__(self, n: int, device: torch.device):
        super().__init__(self._noted)
        self.moved = some_rows(n).to(device)
        self.met_in = ""  # the first function in which rows met
        self._func: Any = None

    def pairs(self, tangents: Sequence[Tensor]) -> list[TangentRef]:
        """The references of the inputs' tangents [n ...]."""
        masks = [self.moved.reshape(-1, *[1] * (d.ndim - 1)) for d in tangents]
        return [(d, d * mask) for d, mask in zip(tangents, masks, strict=True)]

    def output_tangents(
        self, jvp: JvpFn, inputs: Sequence[TangentRef], outputs: Sequence[Tensor]
    ) -> Sequence[TangentRef]:
        if self.ended:
            return [None] * len(outputs)
        with torch.no_grad():
            firsts = listed(jvp(operator.itemgetter(0)))
            seconds = listed(jvp(operator.itemgetter(1)))
        both = zip(firsts, seconds, strict=True)
        pairs = [None if first is None else (first, second) for first, second in both]
        if not self.met_in and self._meet_in(pairs) and not self._meet_in(inputs):
            self.met_in = name_of(self._func)
        return pairs

    def check(self, pair: TangentRef) -> Tensor:
        """The tangent of the output; NotImplementedError if rows depend on one another."""
        first: Tensor = pair[0]
        if rows_meet(pair[0], pair[1], self.moved):
            raise NotImplementedError(
                "one_pass cannot follow a network whose rows depend on one another (they meet in "
                f"{self.met_in or 'its output'}): {COUPLED}"
            )
        return first

    def _noted(self, func: Any) -> JvpRule:
        self._func = func
        return rule_of(func)

    def _meet_in(self, pairs: Sequence[TangentRef]) -> bool:
        given = [pair for pair in pairs if pair is not None and pair[0].numel()]
        of_rows = [pair for pair in given if pair[0].shape[:1] == self.moved.shape]
        return any(rows_meet(pair[0], pair[1], self.moved) for pair in of_rows)
