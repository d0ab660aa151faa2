"""Claims about laws that are drawn from, law(n, rng): of times and of guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.parts.part import OtherDevice, Part, check_untouched, generator
from benchmarks.conformance.results import Broken, ClaimResult, held

ROWS = 64


def determined(part: Part) -> ClaimResult:
    """The same rng gives the same rows, also on the same law; another rng gives others."""
    kept = part.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, again, other = (_draw(kept, seed) for seed in (0, 0, 1))
        torch.manual_seed(1)
        elsewhere = _draw(part.make(), 0)
    if not (_equal(first, again) and _equal(first, elsewhere)):
        raise Broken(
            "two draws with the same rng differ",
            "draw with generator=rng alone, and keep no counter in the law",
        )
    varied = any(not torch.equal(d, d[:1].expand_as(d)) for d in first)
    if varied and _equal(first, other):
        raise Broken(
            "every rng gives the same rows, and these differ from row to row",
            "draw from the rng that is given, such as zoo.times.uniform_draws(n, rng)",
        )
    return held("bit-equal")


def global_generators(part: Part) -> ClaimResult:
    """It draws from its rng alone."""
    law = part.make()
    check_untouched("the law", lambda: law(ROWS, generator()))
    return held("torch, numpy, python")


def device(part: Part) -> ClaimResult:
    """The rows lie on the device of the rng, whatever the default device is."""
    law, hint = part.make(), "make tensors with device=rng.device"
    try:
        with OtherDevice():
            drawn = _draw(law, 0)
    except (RuntimeError, NotImplementedError) as error:
        raise Broken(f"it mixes devices: {str(error).splitlines()[0]}", hint) from error
    if any(d.device.type != "cpu" for d in drawn):
        raise Broken("what it draws lies on the default device, and rng on another", hint)
    return held("that of rng")


def _draw(law: Any, seed: int) -> tuple[Tensor, ...]:
    drawn = law(ROWS, generator(seed))
    return drawn if isinstance(drawn, tuple) else (drawn,)


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
