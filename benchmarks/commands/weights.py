"""objective-zoo export, ema and consolidate: weights as files of their own."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands.arguments import (
    Commands,
    add_bindings,
    add_trust,
    add_weights,
    import_given,
)


def add_to(commands: Commands) -> None:
    export = commands.add_parser("export", help="a network as a folder that needs no gin")
    export.add_argument("run", type=Path, help="a finished run's folder, or a public checkpoint")
    export.add_argument("--out", type=Path, required=True, help="an empty folder to write")
    export.add_argument("--layout", default="", help="layout of a public checkpoint: dit, sit")
    export.add_argument("--num-heads", type=int, help="only for a checkpoint of unusual width")
    export.add_argument(
        "--num-classes", type=int, metavar="N",
        help="only for a checkpoint trained without label dropout, whose last row is a class",
    )  # fmt: skip
    add_weights(export)
    add_bindings(export, "latents.folder = '/new/place'")
    add_trust(export)
    export.set_defaults(command=_export)

    ema = commands.add_parser("ema", help="an average of the weights whose width is chosen now")
    ema.add_argument("run", type=Path, help="the folder of a run with run.power_emas")
    ema.add_argument(
        "--sigma-rel", "--width", type=float, required=True, dest="sigma_rel",
        help="the width as a share of the run, say 0.12 (--width is the former name)",
    )  # fmt: skip
    ema.add_argument("--step", type=int, help="step of the average; default: the last")
    ema.add_argument("--out", type=Path, help="default: RUN/ema_width_SIGMA_REL.safetensors")
    ema.set_defaults(command=_ema)

    whole = commands.add_parser("consolidate", help="a ZeRO checkpoint's weights as one file")
    whole.add_argument("checkpoint", type=Path, help="such as RUN/checkpoints/step_00001000")
    whole.add_argument("--ema", default="", metavar="DECAY", help="the average at this decay")
    whole.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    whole.set_defaults(command=_consolidate)


def _export(arguments: argparse.Namespace) -> None:
    from benchmarks.runs.finished import export_file, export_run
    from registry.folders import check_output

    check_output(arguments.out, "--out", folder=True)
    import_given(arguments)
    if arguments.run.is_dir():
        bindings = tuple(arguments.bindings)
        where = export_run(
            arguments.run, arguments.out, arguments.weights, bindings, arguments.trust_code
        )
    elif arguments.bindings:
        raise ValueError(
            "--set changes bindings of a run's gin file, and a public checkpoint has no such file"
        )
    else:
        where = export_file(
            arguments.run,
            arguments.out,
            arguments.layout,
            arguments.num_heads,
            arguments.num_classes,
        )
    print(f"{where}: model.safetensors, config.json, README.md")


def _ema(arguments: argparse.Namespace) -> None:
    from registry.folders import check_output
    from trainers.ema.reconstruction import reconstruct

    if arguments.out:
        check_output(arguments.out, "--out")
    made = reconstruct(arguments.run, arguments.sigma_rel, arguments.step, arguments.out)
    print(
        f"{made.path}: sigma_rel {made.wanted.sigma_rel:g} at step {made.wanted.step}, from "
        f"{made.num_snapshots} snapshots; its profile is missed by {made.error:.2%}"
    )


def _consolidate(arguments: argparse.Namespace) -> None:
    from registry.folders import check_output
    from trainers.zero.checkpoint import consolidate

    check_output(arguments.out, "--out")
    consolidate(arguments.checkpoint, arguments.out, arguments.ema)
    print(arguments.out)
