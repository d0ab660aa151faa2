"""Parts for gin files that nothing trains, and a job that takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import gin

from registry import gin_setup


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    power: float = 1.0
    floor: float = 0.1


@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    heads: ClassVar = ("u",)

    weight: Adaptive = field(default_factory=Adaptive)
    ratio: float = 0.25

    def loss(self, net, batch, rng):
        return None


def job(objective=None, seed=0, steps=10, shape=None):
    return objective, seed, steps


class Grid:
    def __init__(self, arms=(), axes=None):
        raise AssertionError("a grid is read, not built")


def run(name: str = ""):
    """Build and call `job` as a run does."""
    with gin_setup.arm(name):
        return gin.get_configurable(job)()
