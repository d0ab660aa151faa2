"""Refuses guidance that the network or the data cannot follow, before a run begins.

Without these checks such guidance would have no effect, or the run would fail at its first samples.
"""

from __future__ import annotations

import logging
from typing import TypeVar

import registry
from backbones.network import FlowNetwork
from registry.protocols import Objective, Sampler
from zoo.samplers import ClassifierFree, InputGuidance

Part = TypeVar("Part", ClassifierFree, InputGuidance)

log = logging.getLogger(__name__)


def check_guidance(
    name: str, objective: Objective, sampler: Sampler, net: FlowNetwork, num_classes: int
) -> None:
    """ValueError for guidance without labels, or with a scale that the network has no input for.

    Warns of guidance that compares with an output which is never trained.
    """
    drawn = getattr(objective, "guidance", None) is not None
    by_input = _inside(sampler, InputGuidance)
    guided = [f"{name}.guidance"] if drawn else []
    guided += [
        f"{registry.samplers.name_of(part)}.scale = {part.scale:g}"
        for part in (by_input, _inside(sampler, ClassifierFree))
        if part is not None and part.scale != 1
    ]
    if guided and not num_classes:
        raise ValueError(
            f"{', '.join(guided)}: guidance needs a data set with labels, and this one has none. "
            "Choose another data set, or leave guidance out"
        )
    if (drawn or by_input) and not getattr(net.trunk, "fields", {}).get("guidance_input"):
        what = f"{name}.guidance draws a scale for each row" if drawn else "input_guidance has one"
        raise ValueError(
            f"{what}, and the network has no input for it. Bind "
            f"{registry.backbones.name_of(net.trunk)}.guidance_input = True, and train with it"
            + ("" if drawn else "; @cfg() guides a network without it")
        )
    if guided and _inside(sampler, ClassifierFree) and getattr(objective, "label_dropout", 1) == 0:
        log.warning(
            "cfg compares with the network's output without a label, which %s.label_dropout = 0 "
            "never trains",
            name,
        )


def _inside(sampler: object, kind: type[Part]) -> Part | None:
    """The sampler of this kind: this one, or one of those that it wraps."""
    while sampler is not None and not isinstance(sampler, kind):
        sampler = getattr(sampler, "sampler", None)
    return sampler
