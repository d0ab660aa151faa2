"""Kinds of rows, each of which is weighed alone.

An objective may treat few of its rows in another way than most: one row in eight of Shortcut is
made of two half steps, and a quarter of MeanFlow's rows have r < t. In a mean over all rows a
mistake in the few is small beside the noise of the many.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from registry.protocols import LossOutput

ALL = "all rows"
# Steps below it are as good as none at all: Shortcut's anchor has t - r = 2^-14 where it is exact.
SHORT = 0.05
FEWEST = 8  # rows of a kind, below which it is not weighed


def rows_by_kind(out: LossOutput) -> dict[str, Tensor]:
    """For each kind of rows, a mask [n] of its rows; ALL comes first.

    A kind is told by the length t - r of its step, as `LossOutput.t` and `LossOutput.r` give it.
    Without them all rows are of one kind.
    """
    n = len(out.per_sample)
    found = {ALL: torch.ones(n, dtype=torch.bool)}
    if out.t is None or out.r is None or len(out.t) != n:
        return found
    gap = out.t - out.r
    kinds = {
        "rows with r = t": gap == 0,
        f"rows with 0 < t - r < {SHORT}": (gap > 0) & (gap < SHORT),
        f"rows with t - r >= {SHORT}": gap >= SHORT,
    }
    present = {name: rows for name, rows in kinds.items() if rows.any()}
    return found | present if len(present) > 1 else found


def losses_by_kind(out: LossOutput) -> Iterator[tuple[str, Tensor]]:
    """The mean loss of each kind that has enough rows."""
    for name, rows in rows_by_kind(out).items():
        if name == ALL:
            yield name, out.per_sample.mean()
        elif int(rows.sum()) >= FEWEST:
            yield name, out.per_sample[rows].mean()
