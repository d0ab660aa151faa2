"""Claims about the samplers that are valid for an objective, run on the exact solution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.fixed_point import inapplicable
from benchmarks.conformance.networks import ExactNetwork, Tapped
from benchmarks.conformance.results import Broken, ClaimResult, declared, held
from benchmarks.conformance.subject import F64, GAUSSIAN, Subject
from registry import samplers
from registry.protocols import Network
from registry.sampling import MAPS, needed_by
from zoo.samplers import valid_samplers

NUM = 20_000
LIMIT = 4.5  # standard errors, over some dozen moments


def samplers_reach_the_data(subject: Subject) -> ClaimResult:
    """Each makes as many calls as it declares, reads trained outputs and gives the data's law."""
    if reason := inapplicable(subject):
        return declared(reason)
    names = valid_samplers(subject.make())
    if not names:
        raise Broken(
            "no sampler is valid for it",
            "declare in `trains` what it trains; `objective-zoo list` says what samplers need",
        )
    network = ExactNetwork(
        subject.exact_field(GAUSSIAN), subject.make().heads, subject.exact_outputs
    )
    worst = 0.0
    for name in names:
        few = [_build(subject, name, nfe) for nfe in (1, 2, 3, 4)]
        for sampler in filter(None, few):
            _check_calls(name, sampler, network)
        takes_map_steps = set(needed_by(samplers.get(name))) <= {*MAPS}
        chosen = few[1] or few[0] if takes_map_steps else _build(subject, name, 64)
        worst = max(worst, _check_law(name, chosen, network, exact=takes_map_steps))
    return held(f"{', '.join(names)}; z {worst:.1f} < {LIMIT}", worst, LIMIT)


def _build(subject: Subject, name: str, nfe: int) -> Any:
    """The sampler, or None if it cannot have this number of calls."""
    path = getattr(subject.make(), "path", None)
    try:
        sampler = samplers.get(name)(nfe=nfe)
        if path is not None and hasattr(sampler, "path"):
            sampler = replace(sampler, path=path)
        return subject.edit_sampler(sampler)
    except ValueError:
        return None


def _draw(sampler: Any, network: Network, num: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x1 = torch.randn(num, *GAUSSIAN.shape, generator=rng, dtype=F64)
    with torch.no_grad():
        return sampler(network, x1, None, rng)


def _check_calls(name: str, sampler: Any, network: Network) -> None:
    counting = Tapped(network, 4)
    _draw(sampler, counting, 4)
    if len(counting.calls) != sampler.nfe:
        raise Broken(
            f"{name}(nfe={sampler.nfe}) calls the network {len(counting.calls)} times",
            "nfe is the number of network calls, not of steps",
        )


def _check_law(name: str, sampler: Any, network: Network, *, exact: bool) -> float:
    """Mean and variance of the samples are the data's; an integrator may be off by its step."""
    x0 = _draw(sampler, network, NUM)
    mean, variance = GAUSSIAN.mean, GAUSSIAN.std**2
    slack = 0.0 if exact else 0.1
    errors = (
        ((x0.mean(0) - mean).abs() - slack) / (GAUSSIAN.std / NUM**0.5),
        ((x0.var(0) - variance).abs() - slack * variance) / (variance * (2 / NUM) ** 0.5),
    )
    worst = float(torch.cat(errors).max())
    if not worst < LIMIT:  # true also for nan, which the largest of the errors is if one of them is
        raise Broken(
            f"{name}(nfe={sampler.nfe}) at the exact solution does not keep the data's law: "
            f"std {[round(s, 3) for s in x0.std(0).tolist()]} instead of "
            f"{[round(s, 3) for s in GAUSSIAN.std.tolist()]}, z {worst:.1f}",
            "steps go from t=1 to t=0; a map to t=0 is followed by fresh noise",
        )
    return max(worst, 0.0)
