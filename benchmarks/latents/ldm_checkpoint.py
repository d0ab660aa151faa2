"""Reads an autoencoder from one file in latent-diffusion's layout, such as VA-VAE's.

Names of its tensors are changed to those of diffusers' AutoencoderKL:

    encoder.down.I.block.J        encoder.down_blocks.I.resnets.J       (decoder.up: I counts back)
    encoder.down.I.attn.J         encoder.down_blocks.I.attentions.J    1x1 convolutions as matrices
    encoder.mid.block_1, .attn_1  encoder.mid_block.resnets.0, .attentions.0

The sizes of layers are read from the shapes of the tensors; every norm has 32 groups. The loader of
diffusers is not used, since it leaves out attention inside the levels, which VA-VAE has at 16 x 16.
Other tensors in the file, such as a training's own, are not read. Every tensor of the autoencoder
must be used; otherwise it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from backbones.pretrained.public_files import read_state

_PREFIXES = ("first_stage_model.", "vae.")
_PARTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")
_RENAMED = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.attn\.", r".down_blocks.\1.attentions."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.attn\.", r".up_blocks.\1.attentions."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def read_ldm(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of diffusers' AutoencoderKL and its weights; ValueError if they do not fit."""
    try:
        found = _autoencoder(read_state(path))
        return _fields(found), _converted(found)
    except (ValueError, KeyError) as error:
        what = "an autoencoder in latent-diffusion's layout"
        raise ValueError(f"{path} does not hold {what}: {error}") from None


def _autoencoder(state: Mapping[str, Any]) -> dict[str, Tensor]:
    state = state.get("state_dict", state.get("model", state))
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value.float() for name, value in state.items() if _PARTS.match(name)}


def _fields(found: Mapping[str, Tensor]) -> dict[str, Any]:
    if "encoder.conv_out.weight" not in found:
        raise ValueError("it has no 'encoder.conv_out.weight'")
    levels = _count(found, r"encoder\.down\.(\d+)\.")
    down = [f"encoder.down.{i}.attn.0.q.weight" in found for i in range(levels)]
    up = [f"decoder.up.{i}.attn.0.q.weight" in found for i in reversed(range(levels))]
    return {
        "in_channels": found["encoder.conv_in.weight"].shape[1],
        "out_channels": found["decoder.conv_out.weight"].shape[0],
        "latent_channels": found["encoder.conv_out.weight"].shape[0] // 2,
        "block_out_channels": tuple(
            len(found[f"encoder.down.{i}.block.0.norm2.weight"]) for i in range(levels)
        ),
        "layers_per_block": _count(found, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": tuple(f"{'Attn' * has}DownEncoderBlock2D" for has in down),
        "up_block_types": tuple(f"{'Attn' * has}UpDecoderBlock2D" for has in up),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in found,
        "use_quant_conv": "quant_conv.weight" in found,
        "use_post_quant_conv": "post_quant_conv.weight" in found,
    }


def _count(found: Mapping[str, Tensor], pattern: str) -> int:
    return len({m[1] for name in found if (m := re.match(pattern, name))})


def _converted(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    last = _count(found, r"decoder\.up\.(\d+)\.") - 1
    weights = {}
    for name, value in found.items():
        ours = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{last - int(m[1])}.", name)
        for theirs, other in _RENAMED:
            ours = re.sub(theirs, other, ours)
        is_matrix = ".attentions." in ours and value.ndim == 4
        weights[ours] = value[:, :, 0, 0] if is_matrix else value
    return weights
