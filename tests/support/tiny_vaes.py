"""Randomly initialised VAEs of a few thousand weights, saved as diffusers saves its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def save_kl(folder: Path, seed: int = 0, **config) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}
    AutoencoderKL(**blocks, latent_channels=4, **config).save_pretrained(folder)
    return folder


def save_dc(folder: Path) -> Path:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    depths = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    kinds = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    sizes = widths | depths | scales | kinds
    AutoencoderDC(
        **sizes, latent_channels=4, attention_head_dim=4, scaling_factor=0.5
    ).save_pretrained(folder)
    return folder


def save_tiny(folder: Path) -> Path:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    depths = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**widths, **depths, latent_channels=4).save_pretrained(folder)
    return folder


def photos(folder: Path, n: int = 22, size: int = 20, classes: int = 2) -> Path:
    """Pictures of noise in sub-folders, which are their classes, one half as many as the other."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"class{min(i % (classes + 1), classes - 1)}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder
