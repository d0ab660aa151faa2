"""encode, export, ema, consolidate and send."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands.arguments import Commands, add_bindings, add_weights


def add_to(commands: Commands) -> None:
    _add_encode(commands.add_parser("encode", help="pictures to the latents of a VAE, on disk"))

    export = commands.add_parser("export", help="a network as a folder that needs no gin")
    export.add_argument("run", type=Path, help="a finished run's folder, or a public checkpoint")
    export.add_argument("--out", type=Path, required=True, help="an empty folder to write")
    export.add_argument("--layout", default="", help="of a public checkpoint: dit, sit, ...")
    export.add_argument("--num-heads", type=int, help="of a public checkpoint of unusual width")
    add_weights(export)
    add_bindings(export, "latents.folder = '/new/place'")
    export.set_defaults(command=_export)

    ema = commands.add_parser("ema", help="an average of the weights whose width is chosen now")
    ema.add_argument("run", type=Path, help="the folder of a run with run.power_emas")
    ema.add_argument(
        "--sigma-rel", "--width", type=float, required=True, dest="sigma_rel",
        help="the width as a share of the run, say 0.12 (--width is the former name)",
    )  # fmt: skip
    ema.add_argument("--step", type=int, help="default: the last snapshot's")
    ema.add_argument("--out", type=Path, help="default: RUN/ema_width_SIGMA_REL.safetensors")
    ema.set_defaults(command=_ema)

    whole = commands.add_parser("consolidate", help="a ZeRO checkpoint's weights as one file")
    whole.add_argument("checkpoint", type=Path, help="such as RUN/checkpoints/step_00001000")
    whole.add_argument("--ema", default="", metavar="DECAY", help="the average at this decay")
    whole.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    whole.set_defaults(command=_consolidate)

    send = commands.add_parser("send", help="send records to MLflow that could not be sent before")
    send.add_argument("folder", type=Path, help="the folder of a run or of a comparison")
    send.add_argument("--tracking-uri", help="default: the store that the run was meant for")
    send.set_defaults(command=_send)


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="a folder of pictures")
    parser.add_argument(
        "--vae", required=True, help="a folder of diffusers, a hub id or a short name"
    )
    parser.add_argument("--subfolder", default="", help="of the VAE's folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="continued if it is there")
    parser.add_argument("--resolution", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--no-labels", action="store_true", help="sub-folders are no classes")
    parser.add_argument("--no-flips", action="store_true", help="without the mirrored copy")
    parser.add_argument("--dtype", default="float16", help="on disk; or float32")
    parser.add_argument(
        "--normalise", default="constants", choices=("constants", "channel"),
        help="the VAE's scale and shift, or each channel's own",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes; one a GPU, say")
    parser.add_argument("--device", default="auto", help="default: all GPUs in turn, else the CPU")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures in the VAE at a time")
    parser.add_argument("--shard-rows", type=int, default=1024, help="pictures in a file")
    parser.set_defaults(command=_encode)


def _encode(arguments: argparse.Namespace) -> None:
    from benchmarks.latents.autoencoders import find_vae
    from benchmarks.latents.encode import Encoder, encode

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
    )
    classes = len(manifest.plan["classes"])
    print(
        f"{manifest.num} pictures of {classes or 'no'} classes as {manifest.shape} latents in "
        f"{len(manifest.shards)} shards: {arguments.out}\ntrain on them: "
        f"run.dataset = @latents() and latents.folder = {str(arguments.out)!r}"
    )


def _export(arguments: argparse.Namespace) -> None:
    from benchmarks.runs.finished import export_file, export_run

    if arguments.run.is_dir():
        bindings = tuple(arguments.bindings)
        where = export_run(arguments.run, arguments.out, arguments.weights, bindings)
    elif arguments.bindings:
        raise ValueError("--set binds what a run's gin file could; a public checkpoint has none")
    else:
        where = export_file(arguments.run, arguments.out, arguments.layout, arguments.num_heads)
    print(f"{where}: model.safetensors, config.json, README.md")


def _ema(arguments: argparse.Namespace) -> None:
    from trainers.ema.reconstruction import reconstruct

    made = reconstruct(arguments.run, arguments.sigma_rel, arguments.step, arguments.out)
    print(
        f"{made.path}: sigma_rel {made.wanted.sigma_rel:g} at step {made.wanted.step}, from "
        f"{made.num_snapshots} snapshots; its profile is missed by {made.error:.2%}"
    )


def _consolidate(arguments: argparse.Namespace) -> None:
    from trainers.zero.checkpoint import consolidate

    consolidate(arguments.checkpoint, arguments.out, arguments.ema)
    print(arguments.out)


def _send(arguments: argparse.Namespace) -> None:
    from benchmarks.records.mlflow_sync import send

    for folder, state in send(arguments.folder, arguments.tracking_uri):
        print(f"{folder}: {state}")
