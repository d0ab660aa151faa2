"""objective-zoo encode: pictures to the latents of an autoencoder, on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands.arguments import Commands


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("encode", help="pictures to the latents of a VAE, on disk")
    parser.add_argument("--data", type=Path, required=True, help="a folder of pictures")
    parser.add_argument(
        "--vae", required=True, help="a folder of diffusers, a hub id or a short name"
    )
    parser.add_argument("--subfolder", default="", help="inside the VAE's folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write or continue")
    parser.add_argument(
        "--resolution", type=int, default=256, help="side of the pictures, in pixels"
    )
    parser.add_argument(
        "--no-labels", action="store_true", help="do not take sub-folders as classes"
    )
    parser.add_argument(
        "--splits-are-classes",
        action="store_true",
        help="take sub-folders such as train and test for classes",
    )
    parser.add_argument("--no-flips", action="store_true", help="leave mirrored copies out")
    parser.add_argument("--dtype", default="float16", help="on disk: float16 or float32")
    parser.add_argument(
        "--normalise", default="constants", choices=("constants", "channel"),
        help="take the VAE's scale and shift, or those of each channel",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=1, help="processes, such as one for each GPU"
    )
    parser.add_argument("--device", default="auto", help="default: all GPUs in turn, else the CPU")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="pictures that the VAE takes at a time"
    )
    parser.add_argument("--shard-rows", type=int, default=1024, help="pictures in each file")
    parser.set_defaults(command=_encode)


def _encode(arguments: argparse.Namespace) -> None:
    from benchmarks.latents.autoencoders import find_vae
    from benchmarks.latents.encode import encode
    from benchmarks.latents.shard_encoder import Encoder

    encoder = Encoder(
        vae=find_vae(arguments.vae, arguments.subfolder),
        resolution=arguments.resolution,
        flips=not arguments.no_flips,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
    )
    manifest = encode(
        arguments.data,
        arguments.out,
        encoder,
        normalise=arguments.normalise,
        shard_rows=arguments.shard_rows,
        workers=arguments.workers,
        device=arguments.device,
        labelled=not arguments.no_labels,
        splits_are_classes=arguments.splits_are_classes,
    )
    classes = len(manifest.plan["classes"])
    print(
        f"{manifest.num} pictures of {classes or 'no'} classes as {manifest.shape} latents in "
        f"{len(manifest.shards)} shards: {arguments.out}\ntrain on them: "
        f"run.dataset = @latents() and latents.folder = {str(arguments.out)!r}"
    )
