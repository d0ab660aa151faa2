"""The layout `py_mean_flow`: the DDPM++ U-Net of EDM's code, whose blocks are named by resolution.

`enc.32x32_block0` is the first block of the encoder at 32 x 32; here it is `trunk.down.0`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from backbones.embeddings import NUM_FREQUENCIES
from backbones.pretrained.source import Source


def py_mean_flow(source: Source, num_heads: int | None) -> dict[str, Any]:
    sides = sorted(
        {int(m[1]) for name in source.left if (m := re.match(r"enc\.(\d+)x", name))}, reverse=True
    )
    if not sides:
        raise ValueError("the checkpoint has no encoder, such as 'enc.32x32_conv.weight'")
    blocks = source.count(rf"enc\.{sides[0]}x{sides[0]}_block(\d+)\.")
    enc, dec = _block_names(sides, blocks)
    attention = [
        level
        for level, side in enumerate(sides)
        if f"enc.{side}x{side}_block0.qkv.weight" in source
    ]
    weights = source.linear(f"enc.{sides[0]}x{sides[0]}_conv", "trunk.stem")
    for ours, names in (("down", enc), ("up", dec)):
        for i, name in enumerate(names):
            weights |= _song_block(source, name, f"trunk.{ours}.{i}")
    readout = "heads.average_velocity.readouts.u"
    weights |= source.linear(f"dec.{sides[0]}x{sides[0]}_aux_norm", f"{readout}.norm")
    weights |= source.linear(f"dec.{sides[0]}x{sides[0]}_aux_conv", f"{readout}.conv")
    joint, num_augments = _joint(source)
    weights |= joint
    channels = len(weights["trunk.stem.bias"])
    widths = [
        len(weights[f"trunk.down.{level * (blocks + 1)}.conv1.bias"]) for level in range(len(sides))
    ]
    return {
        "backbone": "ddpmpp",
        "shape": (weights["trunk.stem.weight"].shape[1], sides[0], sides[0]),
        "num_classes": 0,
        "keys": ("u",),
        "weights": weights,
        "fields": {
            "channels": channels,
            "multipliers": tuple(width // channels for width in widths),
            "blocks": blocks,
            "attention_levels": tuple(attention),
            "num_augments": num_augments,
            "time_features": "ddpm",
            "max_frequency": 1.0,
            "second_time": "h",
        },
    }


def _block_names(sides: list[int], blocks: int) -> tuple[list[str], list[str]]:
    """The blocks of encoder and decoder in the order in which they run."""
    enc, dec = [], []
    for level, side in enumerate(sides):
        enc += [f"enc.{side}x{side}_down"] if level else []
        enc += [f"enc.{side}x{side}_block{i}" for i in range(blocks)]
    for level, side in reversed(list(enumerate(sides))):
        first = ["in0", "in1"] if level == len(sides) - 1 else ["up"]
        dec += [f"dec.{side}x{side}_{name}" for name in first]
        dec += [f"dec.{side}x{side}_block{i}" for i in range(blocks + 1)]
    return enc, dec


def _song_block(source: Source, theirs: str, ours: str) -> dict[str, Tensor]:
    names = {"norm0": "norm1", "conv0": "conv1", "affine": "affine", "norm1": "norm2"}
    names |= {"conv1": "conv2"}
    if f"{theirs}.skip.weight" in source:
        names["skip"] = "skip"
    if f"{theirs}.qkv.weight" in source:
        names |= {"norm2": "attention.norm", "qkv": "attention.attn.qkv"}
        names["proj"] = "attention.attn.proj"
    found: dict[str, Tensor] = {}
    for name, own in names.items():
        found |= source.linear(f"{theirs}.{name}", f"{ours}.{own}")
    for name in (f"{ours}.attention.attn.{part}.weight" for part in ("qkv", "proj")):
        if name in found:
            found[name] = found[name][:, :, 0, 0]  # a 1x1 convolution is a matrix
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = torch.outer(taps, taps) / 64
    for name in (f"{theirs}.{part}.resample_filter" for part in ("conv0", "skip")):
        if name in source:
            source.check_equal(name, kernel, "the resampling filter")
    return found


def _joint(source: Source) -> tuple[dict[str, Tensor], int]:
    """The weights of the embedding of both times, and the number of augmentation inputs.

    The public code has sines before cosines. It adds the augmentation before the first layer, and
    we add it after that layer, so the two matrices are multiplied.
    """
    first = source.take("map_layer0.weight", ndim=2)
    if first.shape[1] != 4 * NUM_FREQUENCIES:
        raise ValueError(
            f"map_layer0.weight has shape {list(first.shape)}; only embeddings of two times with "
            f"{2 * NUM_FREQUENCIES} features each can be read"
        )
    sine_t, cosine_t, sine_h, cosine_h = first.split(NUM_FREQUENCIES, dim=1)
    ours = "trunk.conditioning"
    weights = {
        f"{ours}.time.weight": torch.cat([cosine_t, sine_t], dim=1),
        f"{ours}.time.bias": source.take("map_layer0.bias"),
        f"{ours}.second_time.weight": torch.cat([cosine_h, sine_h], dim=1),
        **source.linear("map_layer1", f"{ours}.output"),
    }
    if "map_augment.weight" not in source:
        return weights, 0
    augment = source.take("map_augment.weight", ndim=2)
    weights[f"{ours}.augment.weight"] = (first.double() @ augment.double()).float()
    return weights, augment.shape[1]
