"""The endless sequence of a data set, and its pieces; see benchmarks/data/streams.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def places(size: int, step: int, n: int, seed: int) -> Tensor:
    """The indices int64 [n] that a step takes from a set of this size."""
    return cut(size, step * n, n, lambda epoch: permutation(size, seed, epoch))


def flipped(size: int, step: int, n: int, seed: int) -> Tensor:
    """Which samples of a step are mirrored, bool [n]: each with probability 1/2 in each epoch."""
    return cut(size, step * n, n, lambda epoch: _mirrored(size, seed, epoch))


def subset(size: int, n: int, seed: int) -> Tensor:
    """n different indices below `size` in random order; all of them if n is larger.

    A smaller n gives the first of them, so that a small reference is part of a large one.
    """
    return torch.randperm(size, generator=seeded("reference", size, seed))[:n]


def cut(length: int, start: int, n: int, block: Callable[[int], Tensor]) -> Tensor:
    """Rows start .. start + n - 1 of the sequence block(0), block(1), ..., each `length` rows."""
    pieces = []
    for i in range(start // length, (start + n - 1) // length + 1):
        first = i * length
        pieces.append(block(i)[max(start - first, 0) : start + n - first])
    return torch.cat(pieces)  # copies a single piece too, since blocks are kept


def seeded(purpose: str, *key: int) -> torch.Generator:
    """A generator for one purpose alone, so that data and noise never share random numbers."""
    digest = hashlib.sha256(f"objective-zoo data {purpose} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """The order of a finite set in one epoch; not to be written into."""
    return torch.randperm(size, generator=seeded("epoch", size, seed, epoch))


@lru_cache(maxsize=4)
def _mirrored(size: int, seed: int, epoch: int) -> Tensor:
    return torch.rand(size, generator=seeded("flip", size, seed, epoch)) < 0.5


def apportion(n: int, counts: Tensor) -> Tensor:
    """Whole numbers [k] of sum n in proportion to `counts` [k], by the largest remainder.

    Of equal remainders the one with the lower index is the first.
    """
    total = int(counts.sum())
    shares = n * counts // total
    by_remainder = torch.argsort(n * counts % total, descending=True, stable=True)
    shares[by_remainder[: n - int(shares.sum())]] += 1
    return shares


def interleave(counts: Tensor) -> Tensor:
    """counts[i] copies of each i, spread evenly: (2, 2, 1) becomes 0, 1, 2, 0, 1.

    Every i comes once before any i comes twice.
    """
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    nth = torch.arange(len(labels)) - (torch.cumsum(counts, 0) - counts)[labels]
    return labels[torch.argsort(nth.double() / counts[labels], stable=True)]
