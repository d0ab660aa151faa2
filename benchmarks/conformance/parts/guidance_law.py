"""Claims about a law of guidance: a scale and an interval of times for each row."""

from __future__ import annotations

from benchmarks.conformance.parts import draws
from benchmarks.conformance.parts.part import F32, Claims, Part, check_tensor, generator
from benchmarks.conformance.results import Broken, ClaimResult, held

COUNTS = (1, 2, 7, 64)
MANY = 20_000


def shapes_and_dtypes(part: Part) -> ClaimResult:
    """[n 3], float32, for every n from 1 on."""
    for n in COUNTS:
        check_tensor(f"guidance for n = {n}", part.make()(n, generator()), (n, 3), F32)
    return held(f"{len(COUNTS)} numbers of rows, from 1 to {max(COUNTS)}")


def within_bounds(part: Part) -> ClaimResult:
    """A finite scale of 1 or more, and 0 <= low <= high <= 1."""
    drawn = part.make()(MANY, generator())
    scale, low, high = drawn.unbind(1)
    right = (scale >= 1) & scale.isfinite() & (low >= 0) & (low <= high) & (high <= 1)
    if not right.all():
        row = [round(value, 4) for value in drawn[~right][0].tolist()]
        raise Broken(
            f"{int((~right).sum())} of {MANY} rows are out of range, such as {row}",
            "the columns are a scale >= 1, and an interval with 0 <= low <= high <= 1",
        )
    return held(f"scales from {float(scale.min()):.3g} to {float(scale.max()):.3g}")


CLAIMS: Claims = {
    "shapes and dtypes": shapes_and_dtypes,
    "scale >= 1, 0 <= low <= high <= 1": within_bounds,
    "determined by rng": draws.determined,
    "global generators untouched": draws.global_generators,
    "on the device of rng": draws.device,
}
