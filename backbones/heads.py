"""Heads make the readouts of a network. Each is built on a trunk, as `head(trunk)`.

Every readout is a final layer of its own (normalisation, modulation by c, linear) and starts at
zero; the network's parametrisation says which velocity a readout is. The dual head has two of them:
at DiT-XL/2 the second costs 2.7 million parameters, 0.4 %. No source gives its design; it follows
from the parameter count of DuMo (arXiv 2602.17682), 679M, which two final layers and two time
embedders reproduce. The deep dual head has blocks of its own before each of two readouts, as iMF's
networks do (arXiv 2512.02012): 8 in every size, and those of v are not run where u alone is asked.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backbones.embeddings import NUM_FREQUENCIES, time_features, zero_
from registry import heads
from registry.protocols import BranchingTrunk, Call, Reference
from registry.ranges import Count


class Readouts(nn.Module):
    """One readout of the trunk for each key."""

    keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, trunk: Any):
        super().__init__()
        self.readouts = nn.ModuleDict({key: trunk.readout() for key in self.keys})

    def forward(self, features: Tensor, c: Tensor, at: Call) -> dict[str, Tensor]:
        return {key: readout(features, c) for key, readout in self.readouts.items()}


@heads.register("velocity")
class Velocity(Readouts):
    """Instantaneous velocity v(x, t)."""

    keys = ("v",)
    needs_r: ClassVar = False


@heads.register("average_velocity")
class AverageVelocity(Readouts):
    """Average velocity u(x, t, r) over [r, t]."""

    keys = ("u",)
    needs_r: ClassVar = True


@heads.register("dual_head")
class DualHead(Readouts):
    """Average and instantaneous velocity from one trunk, by two final layers."""

    keys = ("u", "v")
    needs_r: ClassVar = True
    reference: ClassVar = Reference(
        title="Duality Models: An Embarrassingly Simple One-step Generation Paradigm",
        authors="Sun et al.",
        year=2026,
        arxiv="2602.17682",
    )


@heads.register("deep_dual")
class DeepDual(nn.Module):
    """Average and instantaneous velocity, each by blocks of its own after the trunk.

    The blocks are of the trunk's kind, so that an output passes as many as both have together. An
    output that the call does not ask for is left out, as that of v is in samples of the map.
    """

    keys: ClassVar[tuple[str, ...]] = ("u", "v")
    needs_r: ClassVar = True
    reference: ClassVar = Reference(
        title="Improved Mean Flows: On the Challenges of Fastforward Generative Models",
        authors="Geng et al.",
        year=2025,
        arxiv="2512.02012",
    )

    def __init__(self, trunk: Any, blocks: Count = 8):
        super().__init__()
        if not isinstance(trunk, BranchingTrunk):
            raise ValueError(
                f"the head 'deep_dual' takes blocks of the trunk's kind for each output, and "
                f"{type(trunk).__name__} has no branch(blocks) that makes them. Choose @dit, "
                "@lightning_dit or @mlp as the backbone, or @dual_head as the head"
            )
        self.fields = {"blocks": blocks}
        self.branches = nn.ModuleDict({key: trunk.branch(blocks) for key in self.keys})
        self.readouts = nn.ModuleDict({key: trunk.readout() for key in self.keys})

    def forward(self, features: Tensor, c: Tensor, at: Call) -> dict[str, Tensor]:
        return {
            key: self.readouts[key](branch(features, c), c)
            for key, branch in self.branches.items()
            if at.asks_for(key)
        }


@heads.register("twin_velocity")
class TwinVelocity(Readouts):
    """Velocity of the law of the network's own samples, at r = t (TwinFlow)."""

    keys = ("twin",)
    velocities: ClassVar = ("twin",)
    needs_r: ClassVar = False


@heads.register("log_variance")
class LogVariance(nn.Module):
    """Log-variance of the error, a linear function of the conditioning vector."""

    keys: ClassVar[tuple[str, ...]] = ("logvar",)
    needs_r: ClassVar = False

    def __init__(self, trunk: Any):
        super().__init__()
        self.linear = nn.Linear(trunk.dim, 1)
        zero_(self.linear)

    def forward(self, features: Tensor, c: Tensor, at: Call) -> dict[str, Tensor]:
        return {"logvar": self.linear(c).squeeze(-1)}


@heads.register("log_variance_of_times")
class LogVarianceOfTimes(nn.Module):
    """Log-variance of the error, a linear function of slow sines and cosines of t and r.

    It knows both times where the trunk's conditioning has one of them alone (`decoder_from` of a
    backbone), and nothing else. DMF's released code has 64 frequencies for each time, and DiT's
    128 are taken here.
    """

    keys: ClassVar[tuple[str, ...]] = ("logvar",)
    needs_r: ClassVar = True

    def __init__(self, trunk: Any):
        super().__init__()
        self.linear = nn.Linear(2 * 2 * NUM_FREQUENCIES, 1)
        zero_(self.linear)

    def forward(self, features: Tensor, c: Tensor, at: Call) -> dict[str, Tensor]:
        times = torch.cat([time_features(z, 1.0, "dit") for z in (at.t, at.r)], dim=1)
        return {"logvar": self.linear(times.to(self.linear.weight.dtype)).squeeze(-1)}
