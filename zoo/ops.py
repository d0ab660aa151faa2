"""Broadcasting and reductions over [b ...] tensors: the only place where [b] meets [b *d]."""

from __future__ import annotations

import torch
from torch import Tensor

from registry.protocols import Cond, rows_of


def like(s: Tensor, x: Tensor) -> Tensor:
    """s [b] as [b 1 ... 1], to multiply x [b *d]."""
    return s.reshape(-1, *[1] * (x.ndim - 1))


def mean_flat(x: Tensor) -> Tensor:
    """[b *d] -> [b], the mean over all but the first axis."""
    return x.flatten(1).mean(1)


def sum_flat(x: Tensor) -> Tensor:
    """[b *d] -> [b], the sum over all but the first axis."""
    return x.flatten(1).sum(1)


def rms(x: Tensor) -> Tensor:
    """[b *d] -> [b], the root mean square over all but the first axis."""
    return mean_flat(x**2).sqrt()


def normal_like(x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise of x's shape, dtype and device, drawn from rng."""
    return torch.randn(x.shape, generator=rng, dtype=x.dtype, device=x.device)


def clipped(g: Tensor, bound: float, by: str) -> Tensor:
    """g [b *d] limited by a bound, in one of two ways.

    by="element" limits each element to [-bound, bound]; by="rms" limits the root mean square of
    each row to `bound`.
    """
    if by == "element":
        return g.clamp(-bound, bound)
    return g * like(bound / rms(g).clamp_min(bound), g)


def normalised(g: Tensor, offset: float) -> Tensor:
    """g [b *d], with each row divided by the sum of its root mean square and the offset."""
    return g / like(rms(g) + offset, g)


def terms_of(**errors: Tensor) -> dict[str, Tensor]:
    """Raw errors of rows for the log, without gradient; those of no row are left out."""
    return {name: rows.detach() for name, rows in errors.items() if len(rows)}


def first_rows(cond: Cond | None, k: int) -> Cond | None:
    """The conditioning of the first k rows."""
    return rows_of(cond, slice(k))


def rows_from(cond: Cond | None, k: int) -> Cond | None:
    """The conditioning of the rows after the first k."""
    return rows_of(cond, slice(k, None))


def repeat_rows(cond: Cond | None, times: int) -> Cond | None:
    """The conditioning of `times` copies of the batch, one after the other."""
    if cond is None:
        return None
    return {name: torch.cat([value] * times) for name, value in cond.items()}
