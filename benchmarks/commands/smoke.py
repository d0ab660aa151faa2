"""`objective-zoo run RECIPE --smoke`: the whole recipe at a thousandth of its size, on a CPU.

Pictures of noise and a small VAE of random weights are made and encoded, or stand in for the data
set; then the recipe runs with a small network for a few steps, samples, decodes, measures and is
reported. What the recipe binds stays bound: its objective, guidance, optimizer, sampler and EMA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.grids.request import Request
from registry import gin_setup

NUM_PICTURES, NUM_CLASSES, SIDE = 24, 3, 32
BUDGET = (
    "run.steps = 4",
    "run.images = None",
    "run.batch_size = 8",
    "run.num_samples = 12",
    "run.log_every = 1",
    "run.metric = @feature_metrics()",
    "feature_metrics.extractor = @pixels()",
    "feature_metrics.metrics = (@kid(), @precision_recall())",
    "run.recorder = @jsonl()",
    "run.device = 'cpu'",
)
SMALL: Mapping[str, tuple[str, ...]] = {
    "dit": ("dit.dim = 32", "dit.depth = 2", "dit.num_heads = 2"),
    "lightning_dit": (
        "lightning_dit.dim = 32",
        "lightning_dit.depth = 2",
        "lightning_dit.num_heads = 2",
    ),
    "ddpmpp": ("ddpmpp.channels = 8", "ddpmpp.blocks = 1"),
    "unet": ("unet.channels = 8",),
}


def shrunken(request: Request, data: Path) -> Request:
    """The request for the recipe at toy size; its data are made in `data` unless they are there."""
    request.parse()
    backbone = repr(gin_setup.query("run.backbone")).removeprefix("@")
    if backbone not in SMALL:
        raise ValueError(f"--smoke knows how to shrink {', '.join(SMALL)}, not {backbone}")
    calls = gin_setup.query("run.nfe", (1, 2))
    blocks = ["deep_dual.blocks = 1"] * ("deep_dual" in repr(gin_setup.query("run.heads")))
    found = [
        *BUDGET,
        *SMALL[backbone],
        *blocks,
        f"run.nfe = {tuple(sorted({min(n, 4) for n in calls}))}",
    ]
    if gin_setup.query("frozen.checkpoint"):
        found += ["frozen.checkpoint = ''", "frozen.pretrain = 0.5"]
    if gin_setup.query("run.start_from"):
        found += ["run.start_from = ''", "run.start_layout = ''", "run.pretrain = 0.5"]
    if gin_setup.query(f"{backbone}.decoder_from"):
        found.append(f"{backbone}.decoder_from = 1")
    if gin_setup.query("plug_in.group"):
        found.append("plug_in.group = 4")
    found += _data_bindings(repr(gin_setup.query("run.dataset")), data)
    return replace(request, bindings=(*found, *request.bindings))


def _data_bindings(dataset: str, data: Path) -> list[str]:
    pictures = _pictures(data / "pictures")
    if dataset == "@latents()":
        return [f"latents.folder = {str(_latents(pictures, data))!r}"]
    folder = [f"image_folder.folder = {str(pictures)!r}", f"image_folder.resolution = {SIDE}"]
    if dataset == "@edm_augment()":
        return ["edm_augment.data = @image_folder()", *folder]
    return ["run.dataset = @image_folder()", *folder]


def _pictures(folder: Path) -> Path:
    if folder.exists():
        return folder
    rng = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        path = folder / f"class{i % NUM_CLASSES}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return folder


def _latents(pictures: Path, data: Path) -> Path:
    """The pictures as latents of a VAE with random weights, at a quarter of their sides."""
    from benchmarks.latents.autoencoders import find_vae
    from benchmarks.latents.encode import encode
    from benchmarks.latents.shard_encoder import Encoder

    if not (data / "vae").exists():
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
        vae.save_pretrained(data / "vae")
    encoder = Encoder(vae=find_vae(str(data / "vae")), resolution=SIDE)
    encode(pictures, data / "latents", encoder, device="cpu")
    return data / "latents"
