"""Claims about a law of times: its range, its order, its counts and what it states about itself.

A law that changes over the run is held against them at several steps, and as what it settles to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.conformance.parts import draws
from benchmarks.conformance.parts.part import F32, Claims, Part, check_tensor, generator
from benchmarks.conformance.results import Broken, ClaimResult, compared, declared, held
from benchmarks.conformance.subject import STEPS
from registry.protocols import TimeLaw
from zoo.times import law_at, reaches

MANY = 20_000
COUNTS = (*range(1, 41), 64, 100, 128, 255, 1000, 4096)
SEEDS = (0, 1, 2)
TIES = 1e-3  # the share of rows whose two draws may be equal by rounding
KS_LIMIT = 2.23  # of sqrt(n) times the statistic: a probability of 1e-4


def shapes_and_dtypes(part: Part) -> ClaimResult:
    """t and r are float32 [n], for every n from 1 on."""
    law = part.make()
    for n in COUNTS:
        drawn = law(n, generator())
        if not (isinstance(drawn, tuple) and len(drawn) == 2):
            raise Broken(f"it gives a {type(drawn).__name__} for n = {n}", "return t, r")
        for name, times in zip(("t", "r"), drawn, strict=True):
            check_tensor(f"{name} for n = {n}", times, (n,), F32)
    return held(f"{len(COUNTS)} numbers of rows, from 1 to {max(COUNTS)}")


def within_bounds(part: Part) -> ClaimResult:
    """0 <= r <= t <= 1 in every row."""
    for n in (1, 2, 3, MANY):
        for seed in range(20 if n < 4 else 3):
            t, r = part.make()(n, generator(seed))
            wrong = ~((r >= 0) & (r <= t) & (t <= 1))  # true also for nan
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise Broken(
                    f"t = {float(t[row]):.4g} and r = {float(r[row]):.4g} in {int(wrong.sum())} of "
                    f"{n} rows",
                    "t is the noisier time of the two: 0 <= r <= t <= 1",
                )
    return held(f"{3 * MANY} rows")


def count_of_n_alone(part: Part) -> ClaimResult:
    """num_off_diagonal(n) is a whole number from 0 to n, and always the same for the same n."""
    first, second = part.make(), part.make()
    for n in COUNTS:
        numbers = [law.num_off_diagonal(n) for law in (first, second, first)]
        if not all(isinstance(k, int) and 0 <= k <= n for k in numbers):
            raise Broken(
                f"num_off_diagonal({n}) is {numbers[0]!r}",
                f"give an int from 0 to {n}, such as zoo.times.quota(n, fraction)",
            )
        second(n, generator())
        numbers.append(second.num_off_diagonal(n))
        if other := [k for k in numbers if k != numbers[0]]:
            raise Broken(
                f"num_off_diagonal({n}) is {numbers[0]} once and {other[0]} another time",
                "the number depends on n alone: every process and every share must agree on it",
            )
    return held(f"{[first.num_off_diagonal(n) for n in (1, 10, 100)]} of 1, 10, 100 rows")


def order(part: Part) -> ClaimResult:
    """The first num_off_diagonal(n) rows have r < t and the others r = t."""
    for n in (*COUNTS, MANY):
        for seed in SEEDS:
            law = part.make()
            (t, r), k = law(n, generator(seed)), law.num_off_diagonal(n)
            ties, apart = int((r[:k] >= t[:k]).sum()), int((r[k:] != t[k:]).sum())
            if ties > TIES * n or apart:
                raise Broken(
                    f"of {n} rows {int((r < t).sum())} have r < t, {ties} of the first {k} have "
                    f"not, and {apart} of the others have; num_off_diagonal({n}) is {k}",
                    "the rows with r < t come first, and their number is num_off_diagonal(n)",
                )
    return held(f"{len(COUNTS) + 1} numbers of rows")


def reach(part: Part) -> ClaimResult:
    """What it draws is what zoo.times.reaches says of it, which decides about samplers."""
    law = part.make()
    t, r = law(MANY, generator())
    off = r < t
    if bool(off.any()) != reaches(law, 0.7, 0.0):
        raise Broken(
            f"{int(off.sum())} of {MANY} rows have r < t, and num_off_diagonal(10^6) is "
            f"{law.num_off_diagonal(10**6)}",
            "num_off_diagonal(n) is 0 exactly where the law draws no row with r < t",
        )
    if not off.any():
        return held("the diagonal")
    between = float((r[off] > 0).float().mean())
    if (between > 0) != reaches(law, 0.7, 0.3):
        says = getattr(law, "only_to_data", False)
        raise Broken(
            f"{between:.1%} of the rows with r < t have r > 0, and only_to_data is {says}",
            "declare only_to_data = True exactly where r is 0 in every row with r < t",
        )
    return held(f"r > 0 in {between:.1%} of the rows with r < t")


def stated(part: Part) -> ClaimResult:
    """Times follow the law's `cdf`, where it states one (Kolmogorov and Smirnov)."""
    law = part.make()
    if not hasattr(law, "cdf"):
        return declared("it states no cdf(t)")
    t = law(MANY, generator(7))[0].double().sort().values
    below = torch.as_tensor(law.cdf(t)).double()
    check_tensor("cdf(t)", below, (MANY,), below.dtype)
    ends = torch.as_tensor(law.cdf(torch.tensor([0.0, 1.0], dtype=t.dtype))).tolist()
    if not (abs(ends[0]) < 1e-6 and abs(ends[1] - 1) < 1e-6):
        raise Broken(f"cdf(0) is {ends[0]:.4g} and cdf(1) is {ends[1]:.4g}", "cdf(1) is 1")
    steps = torch.arange(MANY + 1, dtype=t.dtype) / MANY
    gap = torch.maximum((below - steps[:-1]).abs(), (below - steps[1:]).abs()).max()
    at = float(t[int(torch.maximum(below - steps[:-1], steps[1:] - below).argmax())])
    return compared(
        "sqrt(n) KS",
        float(gap) * MANY**0.5,
        KS_LIMIT,
        f"the times do not follow cdf(t), most at t = {at:.2g}",
        "cdf(t) is the share of all rows, with r = t and r < t, whose time is at most t",
    )


def same_count_at_every_step(part: Part) -> ClaimResult:
    """Every step has as many rows with r < t as the law that it settles to."""
    law = part.make()
    if not hasattr(law, "at_step"):
        return declared("it is the same at every step")
    for step in STEPS:
        for n in COUNTS:
            numbers = [one.num_off_diagonal(n) for one in (law.at_step(step), law)]
            if numbers[0] != numbers[1]:
                raise Broken(
                    f"num_off_diagonal({n}) is {numbers[0]} at step {step} and {numbers[1]} of the "
                    "law itself",
                    "the number depends on n alone: objectives ask the law itself for it",
                )
    return held(f"{len(STEPS)} steps")


def at_steps(claim: Callable[[Part], ClaimResult]) -> Callable[[Part], ClaimResult]:
    """The claim about the law itself and, if it changes over the run, about that of each step."""

    def held_at_steps(part: Part) -> ClaimResult:
        result = claim(part)
        if result.status == "FAIL" or not hasattr(part.make(), "at_step"):
            return result
        for step in STEPS:

            def make(step: int = step) -> TimeLaw:
                return law_at(part.make(), step)

            try:
                found = claim(Part(part.name, make))
            except Broken as broken:
                raise Broken(f"at step {step}: {broken}", broken.hint) from broken
            if found.status == "FAIL":
                return replace(found, reason=f"at step {step}: {found.reason}")
            if result.status == "declared":  # the law of a step may state what it cannot
                result = found
        if result.status == "declared":
            return result
        return replace(result, figure=f"{result.figure}, and at {len(STEPS)} steps")

    return held_at_steps


CLAIMS: Claims = {
    "a number that depends on n alone": at_steps(count_of_n_alone),
    "the same number at every step": same_count_at_every_step,
    "shapes and dtypes": at_steps(shapes_and_dtypes),
    "0 <= r <= t <= 1": at_steps(within_bounds),
    "rows with r < t come first": at_steps(order),
    "determined by rng": at_steps(draws.determined),
    "global generators untouched": at_steps(draws.global_generators),
    "on the device of rng": at_steps(draws.device),
    "reaches what it declares": reach,
    "follows its stated distribution": at_steps(stated),
}
