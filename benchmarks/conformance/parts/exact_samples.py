"""Claims about a sampler on networks whose exact samples are known."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.networks import ExactNetwork, OnPath
from benchmarks.conformance.parts.part import F64, Part, generator, normal
from benchmarks.conformance.parts.recorded import (
    Recorded,
    outputs_for,
    sampler_of,
    takes_maps_alone,
)
from benchmarks.conformance.results import Broken, ClaimResult, compared, declared, held
from benchmarks.conformance.subject import GAUSSIAN
from registry.protocols import Cond, Network
from zoo.ops import like
from zoo.paths import Linear, TrigFlow

NUM = 20_000
LIMIT = 4.5  # standard errors, over some dozen moments
FEW = (1, 2, 3, 4)
MANY = (256, 255, 128, 64)  # the first that it takes, for integrators
SLACK = 0.05  # of an integrator's samples with so many steps, in units of the data
OFF = 5e-3
CONSTANT = torch.tensor([0.7, -1.3], dtype=F64)


def straight_lines(part: Part) -> ClaimResult:
    """Where the velocity is constant, any number of steps from t = 1 to t = 0 is exact.

    Every call then has the state that the line has at the call's time.
    """
    taken = [s for nfe in (*FEW, 8, 16) if (s := sampler_of(part, nfe)) is not None]
    taken = taken or [part.make()]
    if not all(map(_without_noise, taken)):
        return declared("it adds noise")
    x1, worst = normal(16, 2), 0.0
    for sampler in taken:
        for keys in outputs_for(sampler):
            network = Recorded(_constant(keys))
            x0 = _draw(sampler, network, x1)
            for x, t, *_ in network.calls:
                away = float((x - (x1 - like(1 - t, x1) * CONSTANT)).abs().max())
                if not away < OFF:
                    place = 1 - float(((x1 - x) / CONSTANT).mean())
                    raise Broken(
                        f"with nfe = {sampler.nfe} it asks at t = {float(t[0]):.3g} about the "
                        f"state that a constant velocity reaches at t = {place:.3g}",
                        "the state and the time of a call belong together: the first ones are the "
                        "noise and t = 1",
                    )
                worst = max(worst, away)
            error = float((x0 - (x1 - CONSTANT)).abs().max())
            if not error < OFF:
                way = float(((x1 - x0) / CONSTANT).mean())
                raise Broken(
                    f"with nfe = {sampler.nfe} and a constant velocity it goes {way:.3g} of the "
                    "way from noise to data",
                    "the steps t - r add up to 1: from t = 1 to t = 0, x_r = x - (t - r) u",
                )
            worst = max(worst, error)
    return held(f"off by {worst:.2g} < {OFF:g}", worst, OFF)


def keeps_the_law(part: Part) -> ClaimResult:
    """At the exact solution samples have the data's law, on every path that it may be given.

    A sampler of maps is exact with any number of steps. An integrator comes nearer with more: to
    the exact map, or in law if it adds noise.
    """
    few = [sampler for nfe in FEW if (sampler := sampler_of(part, nfe)) is not None]
    many = next((s for nfe in MANY if (s := sampler_of(part, nfe)) is not None), part.make())
    maps = takes_maps_alone(many)
    if not maps and _without_noise(many):
        return _converges(part, many)
    chosen, worst = few if maps and few else [many], 0.0
    for sampler in chosen:
        for path in (Linear(), TrigFlow()) if _has_path(sampler) else (Linear(),):
            field = GAUSSIAN if isinstance(path, Linear) else OnPath(GAUSSIAN, path)
            given = replace(sampler, path=path) if _has_path(sampler) else sampler
            network = ExactNetwork(field, outputs_for(sampler)[-1])
            worst = max(worst, _law_error(given, network, slack=0.0 if maps else SLACK))
    return compared(
        f"nfe = {', '.join(str(sampler.nfe) for sampler in chosen)}; z",
        worst,
        LIMIT,
        "samples at the exact solution do not have the data's law",
        "steps go from t = 1 to t = 0; a map to t = 0 is followed by fresh noise along the path",
    )


def _has_path(sampler: Any) -> bool:
    return any(f.name == "path" for f in fields(sampler))


def _draw(sampler: Any, network: Network, x1: Tensor, seed: int = 0) -> Tensor:
    with torch.no_grad():
        samples: Tensor = sampler(network, x1, None, generator(seed))
    return samples


def _without_noise(sampler: Any) -> bool:
    """Whether samples are a function of the noise that they start from."""
    network = ExactNetwork(GAUSSIAN, outputs_for(sampler)[-1])
    x1 = normal(4, 2)
    return torch.equal(_draw(sampler, network, x1, seed=0), _draw(sampler, network, x1, seed=1))


def _constant(keys: tuple[str, ...]) -> Network:
    """A network whose velocity, and so whose average velocity, is CONSTANT everywhere."""

    def network(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None) -> dict[str, Tensor]:
        v = CONSTANT.to(x.dtype).expand_as(x)
        return {key: v if key in ("u", "v") else x.new_zeros(len(x)) for key in keys}

    return network


def _law_error(sampler: Any, network: Network, slack: float) -> float:
    """How far mean and variance of the samples are from the data's, in standard errors."""
    x0 = _draw(sampler, network, normal(NUM, *GAUSSIAN.shape, seed=5))
    mean, variance = GAUSSIAN.mean, GAUSSIAN.std**2
    errors = (
        ((x0.mean(0) - mean).abs() - slack) / (GAUSSIAN.std / NUM**0.5),
        ((x0.var(0) - variance).abs() - 2 * slack * variance) / (variance * (2 / NUM) ** 0.5),
    )
    worst = float(torch.cat(errors).max())  # nan if one of them is
    return worst if not worst < 0 else 0.0


def _converges(part: Part, many: Any) -> ClaimResult:
    """Whether more steps come nearer to the exact map."""
    few = next((s for nfe in (16, 15, 32) if (s := sampler_of(part, nfe)) is not None), None)
    network = ExactNetwork(GAUSSIAN, outputs_for(many)[-1])
    x1 = normal(256, *GAUSSIAN.shape, seed=6)
    one = torch.ones(len(x1), dtype=F64)
    exact = GAUSSIAN.flow_map(x1, one, 0 * one)
    fine = float((_draw(many, network, x1) - exact).abs().max())
    coarse = float("inf") if few is None else float((_draw(few, network, x1) - exact).abs().max())
    limit = SLACK * max(MANY) / min(many.nfe, max(MANY))
    return compared(
        f"nfe = {many.nfe}; off by",
        fine if fine < 1e-3 or fine < 0.6 * coarse else max(fine, limit),
        limit,
        f"samples at the exact velocity are off by {fine:.3g} with nfe = {many.nfe}, and by "
        f"{coarse:.3g} with {few.nfe if few else 'fewer'}",
        "each step uses the velocity at the time and the state where it starts",
    )
