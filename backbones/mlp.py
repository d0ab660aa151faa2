"""Residual MLP for vectors, the network of the 2-D problems.

    h <- h + W' SiLU((1 + scale) W h + shift),  (shift, scale) linear in c

There is no normalisation: a point's distance from the origin matters in two dimensions. Inputs
enter as they are, since Fourier features of x would make its tangents large.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.embeddings import Conditioning, modulate, zero_
from backbones.trunk import Branch, TrunkModule, check_decoder
from registry import backbones
from registry.protocols import Cond
from registry.ranges import Count, Positive


class ResidualBlock(nn.Module):
    """One hidden layer with a skip connection around it, scaled and shifted by c."""

    def __init__(self, dim: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)
        zero_(self.modulation)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return h + self.output(F.silu(modulate(self.hidden(h), shift, scale)))


class VectorReadout(nn.Module):
    """(features [b dim], c [b dim]) -> [b d]: modulation, SiLU, zero linear layer."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, size)
        zero_(self.modulation)
        zero_(self.linear)

    def forward(self, features: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return self.linear(F.silu(modulate(features, shift, scale)))


@backbones.register("mlp")
class MLP(TrunkModule):
    """Residual MLP for vectors [b d], conditioned by scale and shift.

    `decoder_from` is that of `dit`: the blocks before it see t alone, the others r alone.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int = 0,
        two_times: bool = False,
        dim: Count = 256,
        depth: Count = 4,
        second_time: str = "h",
        max_frequency: Positive = 8.0,
        time_features: str = "unit",
        guidance_input: bool = False,
        decoder_from: int | None = None,
    ):
        super().__init__()
        check_decoder("mlp", decoder_from, depth)
        if len(shape) != 1:
            raise ValueError(
                f"mlp takes vectors, shape (d,); the data have shape {tuple(shape)}. "
                "For images use @dit or @unet"
            )
        self.dim, self.size = dim, shape[0]
        self.decoder_from = decoder_from if two_times and decoder_from is not None else depth
        self.embed = nn.Linear(self.size, dim)
        self.blocks = nn.ModuleList(ResidualBlock(dim) for _ in range(depth))
        self.conditioning = Conditioning(
            dim,
            num_classes=num_classes,
            two_times=two_times and decoder_from is None,
            second_time=second_time,
            max_frequency=max_frequency,
            time_features=time_features,
            guidance_input=guidance_input,
        )

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        c = self.conditioning(t, r, cond)
        h = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks[: self.decoder_from]:
            h = block(h, c)
        if self.decoder_from < len(self.blocks):
            c = self.conditioning(r, r, cond)
        for block in self.blocks[self.decoder_from :]:
            h = block(h, c)
        return h, c

    def branch(self, blocks: int) -> nn.Module:
        return Branch(ResidualBlock(self.dim) for _ in range(blocks))

    def readout(self) -> nn.Module:
        return VectorReadout(self.dim, self.size)

    def pool(self, features: Tensor) -> Tensor:
        return features
