"""Small convolutional U-Net for images of any size, conditioned by scale and shift.

Each level halves the size (rounding up) and its features return at the same size on the way up, so
odd sizes need no padding. Self-attention sits at the lowest resolution. The second convolution of
each block starts at zero: the block begins as its skip connection.

Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239; the scale-shift
conditioning is from Dhariwal and Nichol, arXiv 2105.05233.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from backbones.embeddings import Conditioning, modulate, zero_
from backbones.trunk import TrunkModule, through
from registry import backbones
from registry.protocols import Cond, Reference
from registry.ranges import Count, Positive, Probability


class GroupNorm(nn.GroupNorm):
    """A group norm with at most 32 groups of at least four channels, in the dtype of its weights.

    On the CPU autocast leaves the input in bfloat16, and the forward-mode tangent of the output
    would then be float32 beside a value in bfloat16.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(math.gcd(channels, max(1, min(32, channels // 4))), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class ResBlock(nn.Module):
    """Two convolutions with a skip connection; c scales and shifts the input of the second."""

    def __init__(self, channels: int, out_channels: int, dim: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(out_channels)
        self.modulation = nn.Linear(dim, 2 * out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)
        zero_(self.conv2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        shift, scale = self.modulation(c)[..., None, None].chunk(2, dim=1)
        h = F.silu(modulate(self.norm2(h), shift, scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class SelfAttention(nn.Module):
    """Attention between all pixels; the identity at initialisation."""

    def __init__(self, channels: int, num_heads: int, eps: float = 1e-5):
        from timm.layers import Attention  # takes 2 s: torchvision too

        super().__init__()
        self.norm = GroupNorm(channels, eps)
        self.attn = Attention(channels, num_heads, qkv_bias=True)
        zero_(self.attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        pixels = rearrange(self.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(self.attn(pixels), "b (h w) c -> b c h w", h=x.shape[2], w=x.shape[3])


class Bottom(nn.Module):
    """The lowest resolution: blocks, attention, blocks."""

    checkpointing = False

    def __init__(self, c_in: int, width: int, dim: int, blocks: int, heads: int, dropout: float):
        super().__init__()
        self.before = _blocks([c_in] + [width] * (blocks - 1), width, dim, dropout)
        self.attention = SelfAttention(width, heads)
        self.after = _blocks([width] * blocks, width, dim, dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.before:
            x = through(block, self.checkpointing, x, c)
        x = self.attention(x)
        for block in self.after:
            x = through(block, self.checkpointing, x, c)
        return x


class Level(nn.Module):
    """Blocks, then the lower levels at half the size, then blocks that see both."""

    checkpointing = False

    def __init__(
        self,
        c_in: int,
        widths: Sequence[int],
        dim: int,
        blocks: int,
        heads: int,
        dropout: float,
    ):
        super().__init__()
        width, *lower = widths
        self.down = _blocks([c_in] + [width] * (blocks - 1), width, dim, dropout)
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.lower = _level(width, lower, dim, blocks, heads, dropout)
        self.grow = nn.Conv2d(lower[0], width, 3, padding=1)
        self.up = _blocks([2 * width] * blocks, width, dim, dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = through(block, self.checkpointing, x, c)
            skips.append(x)
        lower = self.lower(self.shrink(x), c)
        x = self.grow(F.interpolate(lower, size=x.shape[2:], mode="nearest"))
        for block in self.up:
            x = through(block, self.checkpointing, torch.cat([x, skips.pop()], dim=1), c)
        return x


class ConvReadout(nn.Module):
    """(features [b k h w], c [b dim]) -> [b c h w]: norm, modulation, SiLU, zero convolution."""

    def __init__(self, width: int, dim: int, channels: int):
        super().__init__()
        self.norm = GroupNorm(width)
        self.modulation = nn.Linear(dim, 2 * width)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)
        zero_(self.modulation)
        zero_(self.conv)

    def forward(self, features: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[..., None, None].chunk(2, dim=1)
        return self.conv(F.silu(modulate(self.norm(features), shift, scale)))


@backbones.register("unet")
class UNet(TrunkModule):
    """Convolutional U-Net with attention at its lowest resolution, for [b c h w] of any size.

    Level i has `channels * multipliers[i]` channels and `blocks` blocks on the way down, one more
    on the way up. Dropout draws from the global RNG of torch. `checkpointing` recomputes each block
    in the backward pass instead of keeping its activations.
    """

    reference: ClassVar = Reference(
        title="Denoising Diffusion Probabilistic Models",
        authors="Ho et al.",
        year=2020,
        arxiv="2006.11239",
    )

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int = 0,
        two_times: bool = False,
        channels: Count = 64,
        multipliers: Sequence[Count] = (1, 2),
        blocks: Count = 1,
        num_heads: Count = 4,
        dropout: Probability = 0.0,
        checkpointing: bool = False,
        second_time: str = "h",
        max_frequency: Positive = 8.0,
        time_features: str = "unit",
        guidance_input: bool = False,
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        _check(shape, widths, num_heads)
        self.image_channels, self.channels = shape[0], widths[0]
        self.dim = 4 * self.channels
        self.stem = nn.Conv2d(self.image_channels, self.channels, 3, padding=1)
        self.body = _level(self.channels, widths, self.dim, blocks, num_heads, dropout)
        for part in self.body.modules():
            if isinstance(part, Level | Bottom):
                part.checkpointing = checkpointing
        self.conditioning = Conditioning(
            self.dim,
            num_classes=num_classes,
            two_times=two_times,
            second_time=second_time,
            max_frequency=max_frequency,
            time_features=time_features,
            guidance_input=guidance_input,
        )

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        c = self.conditioning(t, r, cond)
        return self.body(self.stem(x.to(self.stem.weight.dtype)), c), c

    def readout(self) -> nn.Module:
        return ConvReadout(self.channels, self.dim, self.image_channels)

    def pool(self, features: Tensor) -> Tensor:
        """The mean of each quadrant: 4 * channels = dim numbers."""
        return F.adaptive_avg_pool2d(features, 2).flatten(1)


def _level(
    c_in: int, widths: Sequence[int], dim: int, blocks: int, heads: int, dropout: float
) -> nn.Module:
    if len(widths) > 1:
        return Level(c_in, widths, dim, blocks, heads, dropout)
    return Bottom(c_in, widths[0], dim, blocks, heads, dropout)


def _blocks(inputs: Sequence[int], width: int, dim: int, dropout: float) -> nn.ModuleList:
    """One block per number of input channels."""
    return nn.ModuleList(ResBlock(c_in, width, dim, dropout) for c_in in inputs)


def _check(shape: tuple[int, ...], widths: Sequence[int], num_heads: int) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"unet takes images, shape (channels, height, width); the data have shape "
            f"{tuple(shape)}. For vectors use @mlp"
        )
    if widths[-1] % num_heads:
        raise ValueError(
            f"unet: the lowest level has channels * multipliers[-1] = {widths[-1]} channels, "
            f"which unet.num_heads = {num_heads} does not divide"
        )
