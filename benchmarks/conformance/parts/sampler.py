"""Claims about a sampler, which runs here on random networks and on exact solutions.

A sampler may refuse a number of evaluations with a ValueError; the claims use those that it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.networks import Toy
from benchmarks.conformance.parts.exact_samples import keeps_the_law, straight_lines
from benchmarks.conformance.parts.part import (
    F32,
    F64,
    SHAPES,
    Claims,
    Part,
    check_tensor,
    check_unchanged,
    check_untouched,
    distance,
    generator,
    normal,
)
from benchmarks.conformance.parts.recorded import Recorded, outputs_for, sampler_of, words_of
from benchmarks.conformance.results import Broken, ClaimResult, compared, declared, held
from registry.protocols import NULL_LABEL, Cond, Network
from registry.sampling import EVEN_STEPS, FROM_NOISE, MAP, TO_DATA, VELOCITY
from zoo.guidance import Guided, unlabelled

FEW = (1, 2, 3, 4, 5, 8, 16)
ALL = range(1, 65)
ROWS = 6
SLACK = 1e-6


def takes_its_evaluations(part: Part) -> ClaimResult:
    """`nfe` is a field; it has the value that is given, and what cannot be is a ValueError."""
    default = part.make()
    if not (isinstance(default.nfe, int) and default.nfe >= 1):
        raise Broken(f"nfe is {default.nfe!r} by default", "nfe: int = 1, or another number")
    taken = [nfe for nfe in ALL if sampler_of(part, nfe) is not None]
    if not taken:
        raise Broken(
            f"it refuses every nfe from 1 to {max(ALL)}",
            "raise ValueError for those alone that the method cannot have",
        )
    for nfe in taken:
        if part.make(nfe=nfe).nfe != nfe:
            raise Broken(
                f"nfe = {nfe} is given and {part.make(nfe=nfe).nfe} is kept",
                "nfe is what the user asks for; refuse with ValueError what cannot be",
            )
    for nfe in (0, -1):
        if sampler_of(part, nfe) is not None:
            raise Broken(
                f"it takes nfe = {nfe}",
                "raise ValueError in __post_init__, as zoo.samplers.methods.check_nfe does",
            )
    refused = len(ALL) - len(taken)
    return held(f"{len(taken)} of {len(ALL)} numbers" + (f", {refused} refused" * bool(refused)))


def shapes_and_dtypes(part: Part) -> ClaimResult:
    """Samples have the shape and the dtype of the noise, whichever the network's outputs are."""
    cases = 0
    for sampler in _few(part):
        for keys in outputs_for(sampler):
            for shape in SHAPES:
                for dtype in (F32, F64):
                    x1 = normal(ROWS, *shape, dtype=dtype)
                    case = f"a sample of shape {list(shape)} in {dtype}, nfe = {sampler.nfe},"
                    try:
                        x0 = _run(sampler, Recorded(Toy(shape, keys)), x1)
                    except KeyError as error:
                        raise Broken(
                            f"it reads the output {error.args[0]!r} of a network that makes "
                            f"{', '.join(keys)}",
                            "needs = ('velocity',) is v, or u at r = t where there is no v "
                            "(zoo.guidance.velocity_at); name any other output in `needs`",
                        ) from error
                    check_tensor(case, x0, x1.shape, dtype)
                    if not x0.isfinite().all():
                        raise Broken(f"{case} is not finite", "look for a division by a time of 0")
                    cases += 1
    return held(f"{cases} cases")


def evaluations(part: Part) -> ClaimResult:
    """It calls the network nfe times, with guidance too."""
    made = 0
    for sampler in _few(part):
        for variant in (sampler, *_guided(sampler)):
            calls = _calls(variant)
            if len(calls) != sampler.nfe:
                raise Broken(
                    f"nfe = {sampler.nfe} makes {len(calls)} calls of the network",
                    "nfe is the number of network calls, not of steps; two rows of one call, as "
                    "for guidance, are one",
                )
            made += len(calls)
    return held(f"{made} calls")


def times(part: Part) -> ClaimResult:
    """Calls have 0 <= r <= t <= 1, and are where it says that it needs the network."""
    met: dict[str, int] = {}
    for sampler in _few(part):
        words = words_of(sampler)
        for _, t, r, _ in _calls(sampler):
            step = f"t = {float(t[0]):.4g}, r = {float(r[0]):.4g}"
            if not ((r >= -SLACK) & (r <= t + SLACK) & (t <= 1 + SLACK)).all():
                raise Broken(
                    f"nfe = {sampler.nfe} calls the network at {step}",
                    "0 <= r <= t <= 1, and t is the noisier time of the two",
                )
            fitting = [word for word in words if _fits(word, float(t[0]), float(r[0]))]
            if not fitting:
                raise Broken(
                    f"nfe = {sampler.nfe} calls the network at {step}, and it needs "
                    f"{', '.join(words)}",
                    "name in `needs` all that it asks of a network (registry/sampling.py): a "
                    "method that does not train it would be sampled at random",
                )
            met[fitting[0]] = met.get(fitting[0], 0) + 1
    return held(", ".join(f"{count} calls for {word}" for word, count in met.items()))


def conditions(part: Part) -> ClaimResult:
    """Every call has all conditions of the samples, and they are not changed."""
    label = torch.arange(ROWS) % 2
    other = torch.arange(ROWS)[:, None].double()
    for sampler in _few(part):
        for variant in (sampler, *_guided(sampler)):
            cond = {"label": label.clone(), "other": other.clone()}
            for x, _, _, given in _calls(variant, cond):
                given = given or {}
                for name, wanted in (("label", label), ("other", other)):
                    found = given.get(name)
                    if found is None or len(found) != len(x) or not _holds(found, wanted):
                        raise Broken(
                            f"the condition {name!r} does not reach every call, with nfe = "
                            f"{sampler.nfe}",
                            "pass cond on: net(x, t, r, cond); add to it by {**cond, ...}",
                        )
            check_unchanged("the sampler", {"label": label, "other": other}, cond)
    return held("every call")


def guidance(part: Part) -> ClaimResult:
    """A scale w samples with null + w (given - null), or it reaches a network that has learned it.

    Samples are those of the same sampler without guidance, run on that combination.
    """
    label, found = {"label": torch.arange(ROWS) % 2}, []
    for variant in (v for sampler in _few(part) for v in _guided(sampler)):
        scale, x1, keys = variant.guidance_scale, normal(ROWS, 2), outputs_for(variant)[-1]
        net = Recorded(Toy((2,), keys))
        samples = _run(variant, net, x1, label)
        told = [(cond or {}).get("guidance") for *_, cond in net.calls]
        if all(row is not None and bool((row[:, 0] == scale).all()) for row in told):
            return declared("the scale is an input of the network")
        plain = replace(variant, scale=1.0)
        found.append(distance(samples, _run(plain, _combined(net.net, scale), x1, label)))
    if not found:
        return declared("it has no guidance")
    return compared(
        "off by",
        max(found),
        1e-9,
        "samples at scale 2 are not those of null + 2 (given - null)",
        "null + scale * (given - null), with the same noise, at every call in the interval",
    )


def determined(part: Part) -> ClaimResult:
    """The same noise and rng give the same samples; nothing else is drawn, or changed in place."""
    for sampler in _few(part):
        net = Toy((2,), outputs_for(sampler)[0])
        x1 = normal(ROWS, 2)
        before = x1.clone()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first, again = _run(sampler, net, x1), _run(sampler, net, x1)
            torch.manual_seed(1)
            elsewhere = _run(part.make(nfe=sampler.nfe), net, x1)
        check_unchanged("the sampler", {"the noise x1": before}, {"the noise x1": x1})
        if not (torch.equal(first, again) and torch.equal(first, elsewhere)):
            raise Broken(
                f"nfe = {sampler.nfe}: two runs with the same noise and rng differ",
                "draw with generator=rng, such as zoo.ops.normal_like(x, rng), and keep no state",
            )
        check_untouched("the sampler", partial(_run, sampler, net, x1))
    return held("bit-equal")


def rows(part: Part) -> ClaimResult:
    """A sample depends on its own noise alone."""
    change = 0.0
    for sampler in _few(part):
        net = Toy((2,), outputs_for(sampler)[0])
        x1, other = normal(ROWS, 2), normal(ROWS, 2, seed=1)
        other[1] = x1[1]
        one, two = (_run(sampler, net, noise)[1] for noise in (x1, other))
        change = max(change, float((one - two).abs().max()))
    return compared(
        "change",
        change,
        1e-9,
        "a sample changes with the noise of the others",
        "no mean, norm or sorting over the rows",
    )


CLAIMS: Claims = {
    "takes the evaluations that it can have": takes_its_evaluations,
    "shapes and dtypes": shapes_and_dtypes,
    "makes as many calls as nfe": evaluations,
    "calls what it needs, in 0 <= r <= t <= 1": times,
    "conditions reach every call": conditions,
    "guidance is null + scale (given - null)": guidance,
    "determined by noise and rng": determined,
    "rows are independent": rows,
    "straight lines are exact": straight_lines,
    "keeps the law of the data": keeps_the_law,
}


def _few(part: Part) -> Iterator[Any]:
    """The sampler with each of a few numbers of evaluations that it takes, and with its own."""
    taken = [sampler for nfe in FEW if (sampler := sampler_of(part, nfe)) is not None]
    yield from taken or (part.make(),)


def _guided(sampler: Any) -> tuple[Any, ...]:
    """The same sampler with guidance, where that is a field of it."""
    scaled = "scale" in {f.name for f in fields(sampler)} and isinstance(sampler, Guided)
    return (replace(sampler, scale=2.0),) if scaled else ()


def _combined(net: Network, scale: float) -> Network:
    def combined(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
        given, null = net(x, t, r, cond), net(x, t, r, unlabelled(cond))
        return {key: null[key] + scale * (given[key] - null[key]) for key in given}

    return combined


def _run(sampler: Any, net: Any, x1: Tensor, cond: Any = None, seed: int = 0) -> Tensor:
    with torch.no_grad():
        samples: Tensor = sampler(net, x1, cond, generator(seed))
    return samples


def _calls(sampler: Any, cond: Any = None) -> list[Any]:
    cond = {"label": torch.arange(ROWS) % 2} if cond is None else cond
    net = Recorded(Toy((2,), outputs_for(sampler)[0]))
    _run(sampler, net, normal(ROWS, 2), cond)
    return net.calls


def _fits(word: str, t: float, r: float) -> bool:
    """Whether an objective that trains this has trained the network at (t, r)."""
    gap = t - r
    if word == VELOCITY:
        return abs(gap) < SLACK
    if gap < SLACK:
        return word not in (MAP, TO_DATA, FROM_NOISE, EVEN_STEPS)
    if word == EVEN_STEPS:
        return abs(1 / gap - round(1 / gap)) < 1e-3 and abs(t / gap - round(t / gap)) < 1e-3
    return {TO_DATA: r < SLACK, FROM_NOISE: t > 1 - SLACK}.get(word, True)


def _holds(found: Tensor, wanted: Tensor) -> bool:
    """Whether these are the rows that were given, or twice these with labels left out of some."""
    halves = found.split(len(wanted))
    kept = [torch.where(half == NULL_LABEL, wanted, half) for half in halves]
    return all(torch.equal(half, wanted) for half in kept) and any(
        torch.equal(half, wanted) for half in halves
    )
