"""Which parts can be checked: the kind of a name, its subject and its claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import registry
from benchmarks.conformance.parts import (
    coupling,
    data_set,
    guidance_law,
    path,
    sampler,
    time_law,
    weight,
)
from benchmarks.conformance.parts.networks import backbone, head
from benchmarks.conformance.parts.part import Claims, part_of
from benchmarks.conformance.results import ClaimResult, run_claim
from registry.catalogue import kind_named
from registry.core import Registry, did_you_mean


@dataclass(frozen=True)
class Checked:
    """A kind of parts, how the subject of its claims is made, and the claims in their order."""

    kind: Registry
    subject_of: Callable[[str], Any]
    claims: Claims


def _plain(kind: Registry, claims: Claims) -> Checked:
    return Checked(kind, partial(part_of, kind), claims)


CHECKED = (
    _plain(registry.paths, path.CLAIMS),
    _plain(registry.time_laws, time_law.CLAIMS),
    _plain(registry.guidance_laws, guidance_law.CLAIMS),
    _plain(registry.weights, weight.CLAIMS),
    _plain(registry.couplings, coupling.CLAIMS),
    _plain(registry.samplers, sampler.CLAIMS),
    Checked(registry.heads, head.subject_of, head.CLAIMS),
    Checked(registry.backbones, backbone.subject_of, backbone.CLAIMS),
    Checked(registry.datasets, data_set.subject_of, data_set.CLAIMS),
)


def kind_of(name: str, kind: str | None = None) -> Registry:
    """The registry that has this name; `kind` says which, where several have it.

    KeyError for a name that no kind has, ValueError for one that several have, and for a kind
    that cannot be checked.
    """
    possible = (registry.objectives, *(checked.kind for checked in CHECKED))
    words = ", ".join(k.kind.replace(" ", "_") for k in possible)
    if kind is not None:
        chosen = kind_named(kind)
        if chosen not in possible:
            raise ValueError(f"there are no claims about a {chosen.kind}; there are for {words}")
        chosen.get(name)
        return chosen
    found = [k for k in registry.kinds if name in k]
    if not found:
        known = [n for k in possible for n in k.names()]
        raise KeyError(
            f"no part named {name!r}.{did_you_mean(name, known)} `objective-zoo list` has all "
            "parts; --import FILE adds those of a file of your own"
        )
    if len(found) > 1:
        ways = " or ".join(f"--kind {k.kind.replace(' ', '_')}" for k in found)
        raise ValueError(f"{name!r} is the name of several parts; say which one by {ways}")
    if found[0] not in possible:
        raise ValueError(f"{name!r} is a {found[0].kind}, and there are claims for {words} alone")
    return found[0]


def subject_of(kind: Registry, name: str) -> Any:
    """The part as its claims take it; ValueError if it cannot be made."""
    return _checked(kind).subject_of(name)


def results_of(kind: Registry, subject: Any) -> Iterator[ClaimResult]:
    """The results of the claims about the part, in order; none is tested if the first fails."""
    for number, (claim_name, claim) in enumerate(_checked(kind).claims.items()):
        result = run_claim(claim_name, claim, subject, partial(_hint, kind))
        yield result
        if number == 0 and result.status == "FAIL":
            return


def _checked(kind: Registry) -> Checked:
    return next(checked for checked in CHECKED if checked.kind is kind)


def _hint(kind: Registry, error: Exception) -> str:
    return f"registry/protocols says what a {kind.kind} is given and what it gives"
