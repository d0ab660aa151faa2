"""A network around the part under test, a backbone or a head, and inputs for it.

Networks start at zero, and a network of zeros shows nothing. So most claims look at an `awake`
copy, whose weights have noise on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.conformance.parts.part import F32, generator, normal
from benchmarks.conformance.results import Broken
from registry.protocols import NULL_LABEL, Cond
from trainers.derivative_probe import perturbed

Shape = tuple[int, ...]
Inputs = tuple[Tensor, Tensor, Tensor, Cond]
NUM_CLASSES = 4


@dataclass(eq=False)
class Built:
    """Networks of one shape of data; `make(num_classes, keys)` builds one as a run does."""

    name: str
    shape: Shape
    keys: tuple[str, ...]
    make: Callable[[int, tuple[str, ...]], nn.Module]
    own: Callable[[nn.Module], nn.Module] = lambda net: net  # what of a network is the part's
    of_states: tuple[str, ...] = ("u", "v")  # outputs that have the shape of the data
    kept: dict[Any, nn.Module] = field(default_factory=dict, repr=False)

    def fresh(self, num_classes: int = NUM_CLASSES) -> nn.Module:
        """A network as built, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(num_classes, self.keys).eval()

    def awake(self, num_classes: int = NUM_CLASSES, keys: tuple[str, ...] = ()) -> nn.Module:
        """The same network with noise on its weights; it is kept, so do not change it."""
        keys = keys or self.keys
        if (num_classes, keys) not in self.kept:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made = self.make(num_classes, keys)
                self.kept[num_classes, keys] = perturbed(made, torch.device("cpu")).eval()
        return self.kept[num_classes, keys]

    def precise(self) -> tuple[nn.Module, torch.dtype]:
        """The awake network in float64, or in float32 where it cannot compute in float64."""
        if "precise" not in self.kept:
            net = copy.deepcopy(self.awake()).double()
            try:
                with torch.no_grad():
                    net(*self.inputs(2, torch.float64))
            except RuntimeError:  # a cast inside the network
                net = self.awake()
            self.kept["precise"] = net
        net = self.kept["precise"]
        return net, F32 if net is self.kept[NUM_CLASSES, self.keys] else torch.float64

    def inputs(self, n: int, dtype: torch.dtype = F32, seed: int = 0) -> Inputs:
        """States, times 0 < r < t < 1 and labels, the first of which is the null label."""
        shares = torch.rand(2, n, generator=generator(seed), dtype=torch.float64)
        t = 0.2 + 0.7 * shares[0]
        r = t * (0.1 + 0.8 * shares[1])
        label = torch.arange(n) % (NUM_CLASSES + 1) + NULL_LABEL
        return (
            normal(n, *self.shape, seed=seed, dtype=dtype),
            t.to(dtype),
            r.to(dtype),
            {"label": label},
        )

    def outputs(self, net: nn.Module, *inputs: Any) -> dict[str, Tensor]:
        """The outputs without gradient, checked to be those that are named."""
        with torch.no_grad():
            out = net(*inputs)
        if missing := [key for key in self.keys if key not in out]:
            raise Broken(
                f"the output {missing[0]!r} is missing; the network makes {', '.join(out)}",
                "a head returns {key: tensor} for each of its `keys`",
            )
        return {key: out[key] for key in self.keys}


def together(out: dict[str, Tensor]) -> Tensor:
    """All outputs as [b k], one after the other."""
    return torch.cat(
        [
            value.double().flatten(1) if value.ndim > 1 else value.double()[:, None]
            for value in out.values()
        ],
        1,
    )
