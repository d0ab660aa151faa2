"""DDPM++, the U-Net of CIFAR-10: residual blocks, one-headed attention, filtered resampling.

    h = conv(silu(norm(x))) + W c,   x <- (skip(x) + conv(dropout(silu(norm(h))))) / sqrt(2)

The defaults are the 55M network that EDM and MeanFlow train: 32 x 32 x 128 after the first
convolution, levels of 256 channels, four blocks a level, attention at 16 x 16 and in the middle,
resampling by the filter (1, 3, 3, 1). One MLP takes the features of both times, so that a second
time costs one matrix. cond["augment"] [b num_augments] says how a row was augmented.

Song et al., arXiv 2011.13456, in the form of Karras et al., arXiv 2206.00364. Our reading: the
weights that start at 1e-5 of their usual size there start at zero here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.dit import xavier_
from backbones.embeddings import (
    NUM_FREQUENCIES,
    GuidanceEmbedding,
    LabelEmbedding,
    check_times,
    full_precision,
    time_features,
    zero_,
)
from backbones.trunk import TrunkModule, through
from backbones.unet import GroupNorm, SelfAttention
from registry import backbones
from registry.protocols import Cond, Reference
from registry.ranges import Count, CountOrZero, Positive, Probability

EPS = 1e-6
Step = tuple[int, int, dict[str, Any]]  # channels in, channels out, kind of block


class JointConditioning(nn.Module):
    """(t [b], r [b], cond) -> c [b dim], by one MLP of both times; autocast does not apply."""

    def __init__(
        self,
        dim: int,
        *,
        num_classes: int,
        num_augments: int,
        two_times: bool,
        second_time: str,
        max_frequency: float,
        features: str,
        guidance_input: bool,
    ):
        super().__init__()
        check_times(second_time, max_frequency, features)
        self.second_is_interval = second_time == "h"
        self.max_frequency, self.features, self.num_augments = max_frequency, features, num_augments
        self.time = nn.Linear(2 * NUM_FREQUENCIES, dim)
        self.output = nn.Linear(dim, dim)
        self.label = LabelEmbedding(dim, num_classes) if num_classes else None
        self.augment = nn.Linear(num_augments, dim, bias=False) if num_augments else None
        for layer in filter(None, (self.time, self.output, self.augment)):
            xavier_(layer)
        self.second_time = nn.Linear(2 * NUM_FREQUENCIES, dim, bias=False) if two_times else None
        if self.second_time is not None:
            zero_(self.second_time)
        self.guidance = GuidanceEmbedding(dim, max_frequency, features) if guidance_input else None

    def forward(self, t: Tensor, r: Tensor, cond: Cond | None) -> Tensor:
        with full_precision(t.device.type):
            hidden = self.time(self._features(t))
            if self.label is not None:
                hidden = hidden + self.label(cond)
            if self.augment is not None and cond is not None and "augment" in cond:
                hidden = hidden + self.augment(cond["augment"].to(self.augment.weight.dtype))
            if self.second_time is not None:
                end = t - r if self.second_is_interval else r
                hidden = hidden + self.second_time(self._features(end))
            if self.guidance is not None:
                hidden = hidden + self.guidance(cond, t)
            return F.silu(self.output(F.silu(hidden)))

    def _features(self, t: Tensor) -> Tensor:
        features = time_features(t, self.max_frequency, self.features)
        return features.to(self.time.weight.dtype)


class Resample(nn.Module):
    """Halves or doubles the size with the filter (1, 3, 3, 1) / 8 in both directions."""

    kernel: Tensor

    def __init__(self, up: bool):
        super().__init__()
        self.up = up
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=x.shape[1])
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class DDPMppBlock(nn.Module):
    """Two convolutions with a skip connection, with resampling and attention if they are given."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        dim: int,
        dropout: float,
        *,
        attention: bool = False,
        resample: Resample | None = None,
    ):
        super().__init__()
        self.resample = resample
        self.norm1 = GroupNorm(channels, EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(dim, out_channels)
        self.norm2 = GroupNorm(out_channels, EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels and resample is None
        self.skip = None if same else nn.Conv2d(channels, out_channels, 1)
        for layer in (self.conv1, self.affine):
            xavier_(layer)
        if self.skip is not None:
            xavier_(self.skip)
        zero_(self.conv2)
        self.attention = SelfAttention(out_channels, 1, EPS) if attention else None
        if self.attention is not None:
            qkv = self.attention.attn.qkv
            nn.init.xavier_uniform_(qkv.weight, gain=math.sqrt(0.2))
            nn.init.zeros_(qkv.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.affine(c)[..., None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        x = ((x if self.skip is None else self.skip(x)) + h) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x) * math.sqrt(0.5)


class PlainReadout(nn.Module):
    """(features [b k h w], c) -> [b c h w]: norm, SiLU, zero convolution."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = GroupNorm(width, EPS)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)
        zero_(self.conv)

    def forward(self, features: Tensor, c: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(features)))


@backbones.register("ddpmpp")
class DDPMpp(TrunkModule):
    """The DDPM++ U-Net, for [b c h w] whose sides halve evenly at every level.

    Level i has `channels * multipliers[i]` channels and `blocks` blocks on the way down, one more
    on the way up. Dropout draws from the global RNG of torch. `checkpointing` recomputes each block
    in the backward pass instead of keeping its activations.
    """

    reference: ClassVar = Reference(
        title="Elucidating the Design Space of Diffusion-Based Generative Models",
        authors="Karras et al.",
        year=2022,
        arxiv="2206.00364",
    )

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int = 0,
        two_times: bool = False,
        channels: Count = 128,
        multipliers: Sequence[Count] = (2, 2, 2),
        blocks: Count = 4,
        attention_levels: Sequence[CountOrZero] = (1,),
        dropout: Probability = 0.0,
        checkpointing: bool = False,
        num_augments: CountOrZero = 0,
        second_time: str = "h",
        max_frequency: Positive = 8.0,
        time_features: str = "unit",
        guidance_input: bool = False,
    ):
        super().__init__()
        _check(shape, multipliers, attention_levels)
        self.checkpointing = checkpointing
        widths = [channels * m for m in multipliers]
        self.image_channels, self.width, self.dim = shape[0], widths[0], 4 * channels
        self.cells = {1: (2, 2), 2: (2, 1), 4: (1, 1)}[multipliers[0]]
        self.stem = nn.Conv2d(self.image_channels, channels, 3, padding=1)
        xavier_(self.stem)
        down, self.joins, up = _plan(channels, widths, blocks, set(attention_levels))
        self.down, self.up = (
            nn.ModuleList(DDPMppBlock(n, k, self.dim, dropout, **kind) for n, k, kind in part)
            for part in (down, up)
        )
        self.conditioning = JointConditioning(
            self.dim,
            num_classes=num_classes,
            num_augments=num_augments,
            two_times=two_times,
            second_time=second_time,
            max_frequency=max_frequency,
            features=time_features,
            guidance_input=guidance_input,
        )

    def forward(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        c = self.conditioning(t, r, cond)
        x = self.stem(x.to(self.stem.weight.dtype))
        skips = [x]
        for block in self.down:
            x = through(block, self.checkpointing, x, c)
            skips.append(x)
        for block, joins in zip(self.up, self.joins, strict=True):
            x = torch.cat([x, skips.pop()], dim=1) if joins else x
            x = through(block, self.checkpointing, x, c)
        return x, c

    def readout(self) -> nn.Module:
        return PlainReadout(self.width, self.image_channels)

    def pool(self, features: Tensor) -> Tensor:
        """The means over the cells of a grid, which together are 4 * channels = dim numbers."""
        return F.adaptive_avg_pool2d(features, self.cells).flatten(1)


def _plan(
    channels: int, widths: Sequence[int], blocks: int, attention_levels: set[int]
) -> tuple[list[Step], list[bool], list[Step]]:
    """The blocks down; for each block up, whether it joins a skip connection; the blocks up."""
    down: list[Step] = []
    width = channels
    for level, wide in enumerate(widths):
        if level:
            down.append((width, width, {"resample": Resample(up=False)}))
        for _ in range(blocks):
            down.append((width, wide, {"attention": level in attention_levels}))
            width = wide
    skips = [channels] + [out for _, out, _ in down]
    up: list[Step] = [(width, width, {"attention": True}), (width, width, {})]
    joins = [False, False]
    for level, wide in reversed(list(enumerate(widths))):
        if level < len(widths) - 1:
            up.append((width, width, {"resample": Resample(up=True)}))
            joins.append(False)
        for number in range(blocks + 1):
            last = number == blocks and level in attention_levels
            up.append((width + skips.pop(), wide, {"attention": last}))
            joins.append(True)
            width = wide
    return down, joins, up


def _check(
    shape: tuple[int, ...], multipliers: Sequence[Count], attention_levels: Sequence[CountOrZero]
) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"ddpmpp takes images, shape (channels, height, width); the data have shape "
            f"{tuple(shape)}. For vectors use @mlp"
        )
    unit = 2 ** (len(multipliers) - 1)
    if shape[1] % unit or shape[2] % unit:
        raise ValueError(
            f"ddpmpp halves the size {len(multipliers) - 1} times, so height and width must be "
            f"multiples of {unit}; the data are {shape[1]}x{shape[2]}. Give ddpmpp.multipliers "
            "fewer levels, or use @unet"
        )
    if multipliers[0] not in (1, 2, 4):
        raise ValueError(f"ddpmpp.multipliers = {tuple(multipliers)} must start with 1, 2 or 4")
    if not set(attention_levels) <= set(range(len(multipliers))):
        raise ValueError(
            f"ddpmpp.attention_levels = {tuple(attention_levels)} must name levels from 0 to "
            f"{len(multipliers) - 1}"
        )
