"""What an objective is given, a batch or a share of it, and what it returns.

`to_device` and `rows_of` change conditions, which are None for data without any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Cond = Mapping[str, Tensor]
"""Conditions by name, each with one row per sample.

"label": int64 [b], where `NULL_LABEL` marks a row without a label.
"guidance": [b 3], a scale and the interval of times where it holds.
"augment": [b k], how the row was augmented.
A network ignores the conditions that it does not take.
"""

NULL_LABEL = -1


def to_device(
    cond: Cond | None, device: torch.device | str, *, non_blocking: bool = False
) -> Cond | None:
    """The conditions on a device. `non_blocking` is safe towards a GPU alone, as in torch."""
    if cond is None:
        return None
    return {name: value.to(device, non_blocking=non_blocking) for name, value in cond.items()}


def rows_of(cond: Cond | None, rows: slice | Tensor) -> Cond | None:
    """The conditions of some rows of the batch, which a slice or a tensor of indices names."""
    return None if cond is None else {name: value[rows] for name, value in cond.items()}


@dataclass(frozen=True)
class Share:
    """Every `count`-th row of a batch, from row `number` on. The order of the rows is kept.

    With `group` above 1 a batch is cut into groups of so many rows, one after the other, and the
    share has every `count`-th group, whole.
    """

    number: int = 0
    count: int = 1
    group: int = 1

    def rows(self, *values: Any) -> tuple[Any, ...]:
        """The share's rows of each value: a tensor, conditions by name, or None, which stays."""
        return values if self.count == 1 else tuple(self._cut(value) for value in values)

    def size(self, n: int) -> int:
        """How many of the batch's first n rows belong to this share."""
        whole, rest = divmod(n, self.group)
        mine = len(range(self.number, whole, self.count)) * self.group
        return mine + rest * (whole % self.count == self.number)

    def place(self, row: int) -> int:
        """Which row of the batch the share's row is."""
        group, within = divmod(row, self.group)
        return (group * self.count + self.number) * self.group + within

    def write(self, rows: Tensor, batch: Tensor) -> None:
        """Put the share's rows into the place that they have in the batch."""
        by_group = (-1, self.group)
        batch.unflatten(0, by_group)[self.number :: self.count] = rows.unflatten(0, by_group)

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._cut(rows) for name, rows in value.items()}
        if value is None:
            return None
        if self.group == 1:
            return value[self.number :: self.count]
        return value.unflatten(0, (-1, self.group))[self.number :: self.count].flatten(0, 1)


@dataclass(frozen=True)
class Batch:
    """One batch of data, with the step at which it is used.

    An objective keeps no counter: schedules inside it read `step` and `progress`. It draws noise,
    times and labels for the whole batch and computes the losses of its `share`. So neither these
    draws nor quotas of rows depend on how many processes or micro-batches there are.
    """

    x0: Tensor  # [b *d]
    cond: Cond | None = None
    step: int = 0
    progress: float = 0.0  # the part of the run's budget that is spent, in [0, 1]
    share: Share = Share()

    def __len__(self) -> int:
        return len(self.x0)


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns.

    `per_sample` [rows of the share] is weighted and differentiable. The loop takes its mean, and
    reduces nothing else. `terms` {name: [rows]} are for the log, raw and detached: the unweighted
    mean squared error per element, of the rows that the term concerns. An adaptive loss is flat by
    construction, so its weighted value would show no progress. `diagnostics` {name: [rows]} are
    detached too. `t` and `r` [b], where given, let the error about a non-finite loss name the rows.
    """

    per_sample: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    t: Tensor | None = None
    r: Tensor | None = None
