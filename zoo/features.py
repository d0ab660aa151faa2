"""Features of samples, in which an objective compares them in place of their own values.

Perceptual terms, alignment and Drifting compare what a fixed network sees. The gradient passes the
network to its input and leaves its weights alone. `raw_values` has no network; it is for data of
two dimensions and for tests. `random_convolutions` needs no file: textures that are made to match
the layers of a network with random weights look almost like those of a trained one (He et al.,
arXiv 1606.04801). Its form is ours: 3 x 3 convolutions with a SiLU, means over 2 x 2 pixels between
them, and of each layer the mean over every cell of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from registry import features
from registry.protocols import Reference
from registry.ranges import Count


@features.register("raw_values")
@dataclass(frozen=True, kw_only=True)
class RawValues:
    """The values themselves, flattened."""

    feature_net: ClassVar[None] = None

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@features.register("random_convolutions")
@dataclass(kw_only=True)
class RandomConvolutions:
    """Means of the layers of a convolutional network with random weights, for [b c h w].

    The weights are a function of `seed` and the sizes. `cells` is the side of the grid over whose
    cells each layer is averaged, at most the side of the layer.
    """

    reference: ClassVar = Reference(
        title="A Powerful Generative Model Using Random Weights for the Deep Image Representation",
        authors="He et al.",
        year=2016,
        arxiv="1606.04801",
    )

    channels: Count = 3  # of the data
    widths: tuple[int, ...] = (32, 64, 128)
    cells: Count = 2
    seed: int = 0
    _net: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(
                f"random_convolutions.widths = {self.widths!r} must be one or more widths of at "
                "least 1, such as (32, 64)"
            )

    @property
    def feature_net(self) -> nn.Module:
        if self._net is None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)
                net = Convolutions(self.channels, self.widths, self.cells)
            self._net = net.requires_grad_(False).eval()
        return self._net

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"random_convolutions.channels = {self.channels}, and the data have the shape "
                f"{tuple(x.shape[1:])}; it takes [b c h w]. Bind the number of their channels, or "
                "@raw_values() for data that are no pictures"
            )
        found: Tensor = self.feature_net(x)
        return found


class Convolutions(nn.Module):
    """x [b c h w] -> [b k], the means over cells of every layer, one after the other."""

    def __init__(self, channels: int, widths: Sequence[int], cells: int):
        super().__init__()
        self.cells = cells
        self.layers = nn.ModuleList(
            _convolution(c_in, c_out) for c_in, c_out in pairwise((channels, *widths))
        )

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for number, layer in enumerate(self.layers):
            if number and min(x.shape[2:]) > 1:
                x = F.avg_pool2d(x, 2)
            x = F.silu(layer(x))
            size = min(self.cells, x.shape[2]), min(self.cells, x.shape[3])
            found.append(F.adaptive_avg_pool2d(x, size).flatten(1))
        return torch.cat(found, dim=1)


def _convolution(c_in: int, c_out: int) -> nn.Conv2d:
    """3 x 3, with weights that keep the size of values to about a SiLU."""
    layer = nn.Conv2d(c_in, c_out, 3, padding=1)
    nn.init.normal_(layer.weight, std=math.sqrt(2 / (9 * c_in)))
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
