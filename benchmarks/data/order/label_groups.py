"""The endless sequence of groups of samples that have one label each.

Group j has the label of the sample that is at place j of the plain sequence (places.py). So over as
many groups as there are samples, which are an epoch of groups, each label has exactly the frequency
of the data.

Each label has an endless sequence of its own: all its samples, in an order that is drawn from the
seed, the label and the round; then all of them again in the next round. The groups of a label take
pieces of it, one after the other. So no sample comes again before all others of its label have
come, and every sample comes equally often in an epoch of groups: as often as a group has rows. A
group has a sample twice only where it is larger than its label, or where one round ends inside it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.data.order.places import cut, permutation, seeded


class LabelGroups:
    """The groups of a finite set with these labels, int64 [n]."""

    def __init__(self, labels: Tensor):
        self.labels = labels
        self.counts = torch.bincount(labels)
        self.starts = torch.cumsum(self.counts, 0) - self.counts
        self.members = torch.argsort(labels, stable=True)  # label 0's samples, then label 1's, ...

    def places(self, step: int, n: int, seed: int, group: int) -> Tensor:
        """The indices int64 [n] that a step takes, each `group` of them with one label."""
        if n % group:
            raise ValueError(f"{n} rows are not made of whole groups of {group} rows of one label")
        size = len(self.labels)
        first, num = step * n // group, n // group
        label = cut(size, first, num, lambda epoch: _epoch(self, seed, epoch)[0])
        turn = cut(size, first, num, lambda epoch: _epoch(self, seed, epoch)[1])
        return torch.cat(
            [
                self._samples(of, nth * group, group, seed)
                for of, nth in zip(label.tolist(), turn.tolist(), strict=True)
            ]
        )

    def _samples(self, label: int, first: int, n: int, seed: int) -> Tensor:
        """n samples from place `first` on of the label's own sequence."""
        count, start = int(self.counts[label]), int(self.starts[label])
        orders = _orders(self, seed)
        within = cut(count, first, n, lambda turn: orders.of(label, count, turn))
        return self.members[start + within]


class _Orders:
    """The newest order of each label; an order is drawn again where another one is asked for."""

    def __init__(self, seed: int):
        self._seed = seed
        self._newest: dict[int, tuple[int, Tensor]] = {}

    def of(self, label: int, count: int, turn: int) -> Tensor:
        known = self._newest.get(label)
        if known is None or known[0] != turn:
            rng = seeded("label", label, count, self._seed, turn)
            known = self._newest[label] = turn, torch.randperm(count, generator=rng)
        return known[1]


@lru_cache(maxsize=4)
def _orders(groups: LabelGroups, seed: int) -> _Orders:
    return _Orders(seed)


@lru_cache(maxsize=4)
def _epoch(groups: LabelGroups, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """The label of each group of an epoch, and how many groups of it came before in all epochs."""
    labels = groups.labels[permutation(len(groups.labels), seed, epoch)]
    order = torch.argsort(labels, stable=True)
    before = torch.empty_like(labels)
    before[order] = torch.arange(len(labels)) - groups.starts[labels[order]]
    return labels, before + epoch * groups.counts[labels]
