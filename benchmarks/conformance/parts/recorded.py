"""What a sampler asks of a network: the words of its `needs`, and a network that records calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.conformance.parts.part import Part
from benchmarks.conformance.results import Broken
from registry.protocols import Cond, Network
from registry.sampling import MAPS, VELOCITY, WORDS, needed_by


class Recorded:
    """A network that keeps x, t, r and the conditions of every call.

    Broken for times that have not one number for each row.
    """

    def __init__(self, net: Network):
        self.net, self.calls = net, list[tuple[Tensor, Tensor, Tensor, Cond | None]]()

    def __call__(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        if t.shape != (len(x),) or r.shape != (len(x),):
            raise Broken(
                f"the network is called with x {list(x.shape)}, t {list(t.shape)}, "
                f"r {list(r.shape)}",
                "t and r have one number for each row: torch.full((len(x),), t)",
            )
        self.calls.append((x.clone(), t.clone(), r.clone(), cond))
        return self.net(x, t, r, cond)


def sampler_of(part: Part, nfe: int) -> Any:
    """The sampler with this number of evaluations, or None if it refuses it."""
    try:
        return part.make(nfe=nfe)
    except ValueError:
        return None


def words_of(sampler: Any) -> tuple[str, ...]:
    """What it needs; for one that runs another sampler, what that one needs."""
    return needed_by(sampler) or words_of(sampler.sampler)


def takes_maps_alone(sampler: Any) -> bool:
    return {*words_of(sampler)} <= {*MAPS}


def outputs_for(sampler: Any) -> list[tuple[str, ...]]:
    """The sets of outputs of networks on which it must run.

    The velocity is v, or u at r = t of a network that has no v.
    """
    words = words_of(sampler)
    named = tuple(word for word in words if word not in WORDS)
    maps, velocity = any(word in MAPS for word in words), VELOCITY in words
    found: list[tuple[str, ...]]
    if maps:
        found = [("u",), ("u", "v")] if velocity else [("u",)]
    else:
        found = [("v",), ("u",), ("u", "v")] if velocity else [()]
    return list(dict.fromkeys(tuple(dict.fromkeys((*keys, *named))) for keys in found))
