"""Claims about a coupling, which decides which row of noise is paired with which row of data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.parts.part import (
    F32,
    F64,
    SHAPES,
    Claims,
    Part,
    check_tensor,
    check_unchanged,
    check_untouched,
    normal,
)
from benchmarks.conformance.results import Broken, ClaimResult, held

COUNTS = (1, 2, 3, 8, 33)
BATCHES = 12


def permutation(part: Part) -> ClaimResult:
    """It gives the rows of x1 in some order, each once, in their shape and dtype."""
    cases = 0
    for shape in SHAPES:
        for dtype in (F32, F64):
            for n in COUNTS:
                x0, x1 = _batch(n, shape, dtype=dtype)
                case = f"the noise for {n} rows of shape {list(shape)} in {dtype}"
                paired = part.make()(x0, x1)
                check_tensor(case, paired, x1.shape, dtype)
                _pairing(paired, x1, case)
                cases += 1
    return held(f"{cases} cases")


def determined(part: Part) -> ClaimResult:
    """The same batch gives the same pairing; nothing is drawn and nothing changed in place."""
    coupling = part.make()
    x0, x1 = _batch(16, (2,))
    given = {"x0": x0, "x1": x1}
    before = {name: value.clone() for name, value in given.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = coupling(x0, x1).clone()
        torch.manual_seed(1)
        again = part.make()(x0, x1)
    check_unchanged("the coupling", before, given)
    if not torch.equal(first, again):
        raise Broken("two calls differ", "a coupling is a function of x0 and x1 alone")
    check_untouched("the coupling", lambda: coupling(x0, x1))
    return held("bit-equal")


def couples_rows(part: Part) -> ClaimResult:
    """It declares couples_rows = True exactly if a row's place depends on the other rows."""
    coupling, moved = part.make(), 0
    for seed in range(BATCHES):
        x0, x1 = _batch(8, (2,), seed=seed)
        other0, other1 = _batch(8, (2,), seed=100 + seed)
        kept = seed % 8
        other0[kept], other1[kept] = x0[kept], x1[kept]
        places = [
            int(_pairing(coupling(data, noise), noise, "the noise")[kept])
            for data, noise in ((x0, x1), (other0, x1), (x0, other1))
        ]
        moved += len(set(places)) > 1
    says = bool(getattr(coupling, "couples_rows", False))
    if says != (moved > 0):
        raise Broken(
            f"a row's noise depends on other rows in {moved} of {BATCHES} batches, and "
            f"couples_rows is {says}",
            "declare couples_rows: ClassVar = True exactly if it looks at other rows: they are "
            "then paired within one condition, and marginal velocities are others",
        )
    return held(f"{says}; {moved} of {BATCHES} batches")


CLAIMS: Claims = {
    "a permutation of the noise": permutation,
    "determined by the batch": determined,
    "couples_rows as declared": couples_rows,
}


def _batch(
    n: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = F64
) -> tuple[Tensor, Tensor]:
    x0 = normal(n, *shape, seed=2 * seed, dtype=dtype)
    return x0, normal(n, *shape, seed=2 * seed + 1, dtype=dtype)


def _pairing(paired: Any, x1: Tensor, case: str) -> Tensor:
    """For each row the place in x1 that its noise comes from; Broken if it is no permutation."""
    same = (paired.flatten(1)[:, None] == x1.flatten(1)[None]).all(2)
    if not ((same.sum(0) == 1).all() and (same.sum(1) == 1).all()):
        missing = int((same.sum(0) == 0).sum())
        raise Broken(
            f"{case} is no permutation of x1: {missing} of its {len(x1)} rows are not there",
            "give x1[pairing], where pairing has every row once; a plan that repeats rows changes "
            "the law of the noise",
        )
    return same.int().argmax(1)
