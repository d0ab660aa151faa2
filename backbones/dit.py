"""Diffusion transformer: patches, adaLN-zero blocks of timm's attention and MLP, linear readout.

    x <- x + gate * f((1 + scale) LayerNorm(x) + shift),  f = attention, then MLP

with (shift, scale, gate) linear in c and zero at initialisation, so that each block starts as the
identity. Differences from the released code: unscaled times, an optional second time and larger
initial embeddings (see embeddings.py), no variance channels, positions as a buffer.

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from einops import rearrange
from torch import Tensor, nn

from backbones.embeddings import Conditioning, modulate, positions_2d, zero_
from backbones.trunk import Branch, TrunkModule, check_decoder, through
from registry import backbones
from registry.protocols import Cond, Reference
from registry.ranges import Count, Positive, Probability

NORMS = ("layer", "rms")


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by c."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        qk_norm: bool,
        norm: str = "layer",
    ):
        from timm.layers import Attention, GELUTanh, Mlp, RmsNorm  # takes 2 s: torchvision too

        super().__init__()
        self.norm1 = plain_norm(norm, dim)
        self.attn = Attention(
            dim, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=RmsNorm, proj_drop=dropout
        )
        self.norm2 = plain_norm(norm, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=GELUTanh, drop=dropout)
        self.modulation = nn.Linear(dim, 6 * dim)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            xavier_(layer)
        zero_(self.modulation)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        )  # [b 1 dim] each
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def plain_norm(kind: str, dim: int) -> nn.Module:
    """A norm without weights; ValueError unless it is 'layer' or 'rms'."""
    if kind not in NORMS:
        raise ValueError(f"dit.norm = {kind!r}; allowed are {', '.join(map(repr, NORMS))}")
    if kind == "rms":
        from timm.layers import RmsNorm

        return RmsNorm(dim, eps=1e-6, affine=False)
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


class PatchReadout(nn.Module):
    """(tokens [b n dim], c [b dim]) -> [b c h w]: a final layer with its own modulation."""

    def __init__(
        self,
        dim: int,
        channels: int,
        grid: tuple[int, int],
        patch: int,
        norm: nn.Module,
    ):
        super().__init__()
        self.height, self.width = grid
        self.patch = patch
        self.norm = norm
        self.modulation = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch * patch * channels)
        zero_(self.modulation)
        zero_(self.linear)

    def forward(self, tokens: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, dim=-1)
        patches = self.linear(modulate(self.norm(tokens), shift, scale))
        return rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=self.height,
            w=self.width,
            p=self.patch,
            q=self.patch,
        )


class PatchTransformer(TrunkModule):
    """A transformer on the patches of [b c h w], with blocks (tokens, c) -> tokens.

    `block` and `conditioning` make those parts. They are called in this order, in which the initial
    weights are drawn. The blocks from number `decoder_from` on, and the readouts, see the end r in
    the place of t; without it all of them see what `conditioning` makes of both.
    """

    positions: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        patch: int,
        dim: int,
        depth: int,
        block: Callable[[], nn.Module],
        conditioning: Callable[[], Conditioning],
        checkpointing: bool,
        trained_positions: bool = False,
        decoder_from: int | None = None,
    ):
        super().__init__()
        self.decoder_from = depth if decoder_from is None else decoder_from
        self.channels, self.grid = shape[0], (shape[1] // patch, shape[2] // patch)
        self.dim, self.patch, self.checkpointing = dim, patch, checkpointing
        self.new_block = block
        self.embed = nn.Linear(self.channels * patch * patch, dim)
        xavier_(self.embed)
        positions = positions_2d(*self.grid, dim)
        if trained_positions:
            self.positions = nn.Parameter(positions)
        else:
            self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.conditioning = conditioning()

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        c = self.conditioning(t, r, cond)
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        tokens = self.embed(patches.to(self.embed.weight.dtype)) + self.positions
        for block in self.blocks[: self.decoder_from]:
            tokens = through(block, self.checkpointing, tokens, c)
        if self.decoder_from < len(self.blocks):
            c = self.conditioning(r, r, cond)
        for block in self.blocks[self.decoder_from :]:
            tokens = through(block, self.checkpointing, tokens, c)
        return tokens, c

    def branch(self, blocks: int) -> nn.Module:
        return Branch((self.new_block() for _ in range(blocks)), self.checkpointing)

    def pool(self, features: Tensor) -> Tensor:
        return features.mean(1)


@backbones.register("dit")
class DiT(PatchTransformer):
    """Diffusion transformer with adaLN-zero, for [b c h w].

    `norm` is 'layer', or 'rms' for root mean squares. Positions are sines and cosines; with
    `trained_positions` they are weights that start with these values. Dropout draws from the global
    RNG of torch. `checkpointing` recomputes each block in the backward pass instead of keeping its
    activations. `decoder_from` is a block's number, counted from 0, for a network with two times:
    the blocks before it see t alone, and it and those after it r alone, by one embedder. There is
    no second embedder then, so that such a network has the weights of one with a single time, and
    its average velocity at r = t is the velocity of that network (Lee et al., arXiv 2510.24474).
    """

    reference: ClassVar = Reference(
        title="Scalable Diffusion Models with Transformers",
        authors="Peebles and Xie",
        year=2022,
        arxiv="2212.09748",
    )

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int = 0,
        two_times: bool = False,
        patch: Count = 2,
        dim: Count = 384,
        depth: Count = 6,
        num_heads: Count = 6,
        mlp_ratio: Positive = 4.0,
        dropout: Probability = 0.0,
        qk_norm: bool = False,
        second_time: str = "h",
        max_frequency: Positive = 8.0,
        time_features: str = "unit",
        guidance_input: bool = False,
        checkpointing: bool = False,
        norm: str = "layer",
        trained_positions: bool = False,
        decoder_from: int | None = None,
    ):
        check_decoder("dit", decoder_from, depth)
        check_patches("dit", shape, patch, dim, num_heads)
        super().__init__(
            shape=shape,
            patch=patch,
            dim=dim,
            depth=depth,
            block=partial(DiTBlock, dim, num_heads, mlp_ratio, dropout, qk_norm, norm),
            conditioning=lambda: Conditioning(
                dim,
                num_classes=num_classes,
                two_times=two_times and decoder_from is None,
                second_time=second_time,
                max_frequency=max_frequency,
                time_features=time_features,
                guidance_input=guidance_input,
            ),
            checkpointing=checkpointing,
            trained_positions=trained_positions,
            decoder_from=decoder_from if two_times else None,
        )
        self.norm = norm

    def readout(self) -> nn.Module:
        norm = plain_norm(self.norm, self.dim)
        return PatchReadout(self.dim, self.channels, self.grid, self.patch, norm)


def xavier_(layer: nn.Linear | nn.Conv2d) -> None:
    """Uniform weights by Xavier's rule, zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def check_patches(name: str, shape: tuple[int, ...], patch: int, dim: int, num_heads: int) -> None:
    """ValueError unless images of this shape can be cut into patches, and the width into heads."""
    unit = math.lcm(4, num_heads)  # the position embedding has four parts
    if dim % unit:
        raise ValueError(
            f"{name}.dim = {dim} must be a multiple of 4 and of {name}.num_heads = {num_heads}. "
            f"Nearest legal dim: {_nearest(dim, unit)}"
        )
    if len(shape) != 3:
        raise ValueError(
            f"{name} takes images, shape (channels, height, width); the data have shape "
            f"{tuple(shape)}. For vectors use @mlp"
        )
    _, height, width = shape
    if patch < 1 or height % patch or width % patch:
        fitting = [p for p in range(1, min(height, width) + 1) if not (height % p or width % p)]
        raise ValueError(
            f"images of {height}x{width} cannot be cut into patches of {name}.patch = {patch}. "
            f"Patches that fit: {', '.join(map(str, fitting))}. Nearest legal height: "
            f"{_nearest(height, max(patch, 1))}; width: {_nearest(width, max(patch, 1))}"
        )


def _nearest(n: int, unit: int) -> str:
    """The positive multiples of unit on both sides of n, as text."""
    lower = n // unit * unit
    return str(n) if lower == n else f"{lower} or {lower + unit}" if lower else str(unit)
