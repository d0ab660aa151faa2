"""The command line: objective-zoo run | grid | list | check | sample | send.

Nothing heavy is imported before the arguments are read, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.request import Request

EXPECTED = (ValueError, KeyError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 1 if a run failed, 2 for a request in error."""
    try:
        try:
            status = _main(argv)
        finally:
            sys.stdout.flush()
        if "RANK" in os.environ:  # one of several: DeepSpeed's threads may abort an ordinary end
            sys.stderr.flush()
            os._exit(status)
        return status
    except BrokenPipeError:  # whoever reads our output has enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Given by torch itself at the first forward-mode derivative.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
    arguments = _parser().parse_args(argv)
    arguments.words = ["objective-zoo", *(sys.argv[1:] if argv is None else argv)]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        arguments.command(arguments)
    except BrokenPipeError:
        raise
    except Exception as error:
        if arguments.traceback:
            raise
        from registry.gin_errors import said

        hint = "" if isinstance(error, EXPECTED) else "\nobjective-zoo --traceback ... shows where"
        print(f"error: {said(error)}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        if end.code:
            print(end.code, file=sys.stderr)
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="objective-zoo",
        description="Compare training objectives for one- and few-step generation.",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train, sample and measure what a gin file says")
    _add_request(run)
    run.add_argument("--out", type=Path, help="folder of the runs; default runs/NAME-DATE-TIME")
    run.add_argument("--resume", action="store_true", help="continue what is in --out")
    run.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    run.add_argument(
        "--launcher", choices=("deepspeed",), help="in processes of this machine; see --ranks"
    )
    run.add_argument("--ranks", type=int, default=1, help="how many processes, one per GPU")
    run.add_argument("--smoke", action="store_true", help="a recipe at 1/1000 of its size")
    run.set_defaults(command=_run)

    grid = commands.add_parser("grid", help="run every cell of a gin file's arms and axes")
    _add_request(grid)
    grid.add_argument(
        "--out", type=Path, help="folder of the grid; default runs/NAME; goes on there"
    )
    grid.add_argument("--workers", type=int, help="cells at a time, each in a process of its own")
    grid.add_argument("--dry-run", action="store_true", help="list the cells, estimate the time")
    grid.add_argument("--retry-failed", action="store_true", help="run cells again that failed")
    grid.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    grid.set_defaults(command=_grid)

    listing = commands.add_parser("list", help="every registered part, with its paper")
    listing.add_argument("--kind", help="one kind only, such as objective")
    listing.add_argument("--import", dest="file", type=Path, help="a Python file of your own parts")
    listing.add_argument("--bibtex", action="store_true", help="the references as BibTeX")
    listing.set_defaults(command=_list)

    check = commands.add_parser("check", help="test an objective against closed forms")
    check.add_argument("name", help="a registered objective, such as mean_flow")
    check.add_argument("--import", dest="file", type=Path, help="a Python file of your own parts")
    check.add_argument("--mutations", action="store_true", help="plant mistakes, list what rejects")
    check.add_argument("--json", action="store_true", help="for machines")
    check.set_defaults(command=_check)

    sample = commands.add_parser("sample", help="draw samples from a finished run")
    sample.add_argument("run", type=Path, help="the folder of a finished run")
    sample.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4], help="network evaluations")
    sample.add_argument("--num", type=int, default=64, help="samples per NFE")
    sample.add_argument("--seed", type=int, default=0, help="of the noise")
    sample.add_argument("--sampler", help="a registered sampler; default the run's own")
    sample.add_argument("--out", type=Path, default=Path("grid.png"), help="the picture to write")
    sample.set_defaults(command=_sample)

    _add_encode(commands.add_parser("encode", help="pictures to the latents of a VAE, on disk"))
    _add_evaluate(commands.add_parser("evaluate", help="FID and its like of a finished run"))

    report = commands.add_parser("report", help="recorded runs as a page, tables and figures")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a folder, or an MLflow run id")
    report.add_argument(
        "--out", type=Path, required=True, help="folder of report.html and the rest"
    )
    report.add_argument("--baseline", default="", help="row to compare with; default flow_matching")
    report.add_argument("--force", action="store_true", help="also rows that cannot be compared")
    report.add_argument("--tracking-uri", default="", help="MLflow store of the run ids")
    report.set_defaults(command=_report)

    _add_bench(commands.add_parser("bench", help="what a step costs beside flow matching"))

    export = commands.add_parser("export", help="a network as a folder that needs no gin")
    export.add_argument("run", type=Path, help="a finished run's folder, or a public checkpoint")
    export.add_argument("--out", type=Path, required=True, help="an empty folder to write")
    export.add_argument("--layout", default="", help="of a public checkpoint: dit, sit, ...")
    export.add_argument("--num-heads", type=int, help="of a public checkpoint of unusual width")
    export.set_defaults(command=_export)

    whole = commands.add_parser("consolidate", help="a ZeRO checkpoint's weights as one file")
    whole.add_argument("checkpoint", type=Path, help="such as RUN/checkpoints/step_00001000")
    whole.add_argument("--ema", default="", metavar="DECAY", help="the average at this decay")
    whole.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    whole.set_defaults(command=_consolidate)

    send = commands.add_parser("send", help="send records to MLflow that could not be sent before")
    send.add_argument("folder", type=Path, help="the folder of a run or of a comparison")
    send.add_argument("--tracking-uri", help="default: the store that the run was meant for")
    send.set_defaults(command=_send)
    return parser


def _add_encode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="a folder of pictures")
    parser.add_argument(
        "--vae", required=True, help="a folder of diffusers, a hub id or a short name"
    )
    parser.add_argument("--subfolder", default="", help="of the VAE's folder or hub id")
    parser.add_argument("--out", type=Path, required=True, help="continued if it is there")
    parser.add_argument("--resolution", type=int, default=256, help="of the pictures, in pixels")
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


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--num", type=int, default=50_000, help="samples per NFE")
    parser.add_argument("--nfe", type=int, nargs="+", default=[], help="default: the run's own")
    parser.add_argument(
        "--metrics", nargs="+", default=[], help="default: frechet kid precision_recall"
    )
    parser.add_argument(
        "--features", nargs="+", default=[], help="registered extractors; default: the best here"
    )
    parser.add_argument(
        "--reference",
        help="a folder of pictures, an .npz of ADM's layout, cleanfid:NAME_SPLIT_SIZE; default: "
        "the run's own data",
    )
    parser.add_argument(
        "--labels", choices=("balanced", "data"), default="balanced",
        help="as many samples of each class, or with the frequencies of the data",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of noise and draws")
    parser.add_argument("--batch-size", type=int, default=256, help="rows in the network at a time")
    parser.add_argument("--ranks", type=int, default=1, help="processes of this machine, one a GPU")
    parser.add_argument("--save-images", type=Path, metavar="DIR", help="every sample as a PNG")
    parser.add_argument("--out", type=Path, help="default: RUN/evaluation")
    parser.add_argument("--cache", type=Path, help="features of the reference")
    parser.add_argument(
        "--set", dest="bindings", action="append", default=[], metavar="BINDING",
        help="one more binding, such as 'euler.shift = 2.0'; may be repeated",
    )  # fmt: skip
    parser.set_defaults(command=_evaluate)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", default=Path("bench.gin"), help="a gin file")
    parser.add_argument("--objectives", nargs="+", default=[], metavar="ARM", help="default: all")
    parser.add_argument("--backbone", nargs="+", default=[], help="default: the file's own")
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="fp32, bf16")
    parser.add_argument("--derivative", nargs="+", default=["dual"], help="such as dual jvp")
    parser.add_argument("--batch", type=int, help="rows of a step; default: the file's own")
    parser.add_argument("--repeats", type=int, default=5, help="turns of 3 steps")
    parser.add_argument("--compile", action="store_true", help="networks by torch.compile")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--out", type=Path, help="folder of the record; default runs/bench-DATE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result, to compare with")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="fail if a ratio has grown")
    parser.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    parser.add_argument(
        "--set", dest="bindings", action="append", default=[], metavar="BINDING",
        help="one more binding, such as 'dit.dim = 768'; may be repeated",
    )  # fmt: skip
    parser.set_defaults(command=_bench, arm="")


def _add_request(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a gin file, such as experiments/digits.gin")
    parser.add_argument("--arm", default="", help="only this arm of the file")
    parser.add_argument(
        "--set", dest="bindings", action="append", default=[], metavar="BINDING",
        help="one more binding, such as 'run.seed = 1'; may be repeated",
    )  # fmt: skip


def _request(arguments: argparse.Namespace) -> Request:
    from benchmarks.request import Request

    bindings = list(arguments.bindings)
    if arguments.tracking_uri:
        bindings.append(f"mlflow.tracking_uri = {arguments.tracking_uri!r}")
    return Request(file=arguments.file, bindings=tuple(bindings), arm=arguments.arm)


def _run(arguments: argparse.Namespace) -> None:
    from benchmarks.comparison import compare

    if arguments.resume and not arguments.out:
        raise ValueError("--resume needs --out, the folder of the runs to continue")
    from trainers import ranks

    name = f"{arguments.file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = arguments.out or Path("runs") / name
    if arguments.launcher and not ranks.launched():
        return _launch(arguments, out)
    words = [*arguments.words, *([] if arguments.out else ["--out", str(out)])]
    again = shlex.join([*words, *([] if arguments.resume else ["--resume"])])
    request = _request(arguments)
    if arguments.smoke:
        from benchmarks.smoke import shrunken

        request = shrunken(request, out.with_name(f"{out.name}-data"))
    lead = partial(compare, request, out, again=again, resume=arguments.resume)
    if ranks.launched():
        from benchmarks.launch import joined

        return joined(lead, arguments.words)
    lead()
    if arguments.smoke:
        from benchmarks.report import write_report

        write_report([out], out / "report")
        print(f"report    {out / 'report' / 'report.html'}")


def _launch(arguments: argparse.Namespace, out: Path) -> None:
    from benchmarks.launch import start

    words = arguments.words[1:] + ([] if arguments.out else ["--out", str(out)])
    if status := start(words, arguments.ranks):
        raise SystemExit(status)


def _grid(arguments: argparse.Namespace) -> None:
    from benchmarks.comparison import run_grid
    from benchmarks.dry_run import dry_run

    request, out = _request(arguments), arguments.out or Path("runs") / arguments.file.stem
    if arguments.dry_run:
        return dry_run(request, out, arguments.workers)
    run_grid(
        request,
        out,
        again=shlex.join(arguments.words),
        workers=arguments.workers,
        retry_failed=arguments.retry_failed,
    )


def _list(arguments: argparse.Namespace) -> None:
    from benchmarks.catalogue import catalogue

    print(catalogue(arguments.kind, arguments.file, bibtex=arguments.bibtex))


def _check(arguments: argparse.Namespace) -> None:
    from benchmarks.conformance import check

    tell = (lambda line: None) if arguments.json else partial(print, flush=True)
    report = check(arguments.name, arguments.file, mutations=arguments.mutations, tell=tell)
    if arguments.json:
        print(report.json())
    if problems := report.problems():
        raise SystemExit(f"{arguments.name} fails: {', '.join(problems)}")


def _sample(arguments: argparse.Namespace) -> None:
    from benchmarks.sampling import sample_run

    where = sample_run(
        arguments.run,
        nfe=tuple(arguments.nfe),
        num=arguments.num,
        seed=arguments.seed,
        sampler=arguments.sampler,
        out=arguments.out,
    )
    print(f"{arguments.num} samples at NFE {', '.join(map(str, arguments.nfe))}: {where}")


def _encode(arguments: argparse.Namespace) -> None:
    from benchmarks.encode import Encoder, encode
    from benchmarks.vaes import find_vae

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
    )
    print(
        f"{manifest.num} pictures as {manifest.shape} latents in {len(manifest.shards)} shards: "
        f"{arguments.out}\ntrain on them: run.dataset = @latents() and latents.folder = "
        f"{str(arguments.out)!r}"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from trainers import ranks

    if arguments.ranks > 1 and not ranks.launched():
        from benchmarks.launch import start

        if status := start(arguments.words[1:], arguments.ranks):
            raise SystemExit(status)
        return
    from benchmarks.evaluate_run import Request, evaluate_run, table

    request = Request(
        num=arguments.num,
        nfe=tuple(arguments.nfe),
        metrics=tuple(arguments.metrics),
        features=tuple(arguments.features),
        reference=arguments.reference,
        labels=arguments.labels,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        bindings=tuple(arguments.bindings),
        save_images=arguments.save_images,
        cache=arguments.cache,
    )
    if values := evaluate_run(arguments.run, request, arguments.out):
        print(table(values))


def _report(arguments: argparse.Namespace) -> None:
    from benchmarks.report import write_report

    out = arguments.out
    write_report(
        arguments.runs,
        out,
        baseline=arguments.baseline,
        force=arguments.force,
        tracking_uri=arguments.tracking_uri,
    )
    print(f"page      {out / 'report.html'}")
    print(f"tables    {out / 'report.md'}, {out / 'table.csv'}")
    print(f"figures   {out / 'figures'}")


def _bench(arguments: argparse.Namespace) -> None:
    from benchmarks.speed import cases_of, run_bench
    from benchmarks.speed_table import Speed, compare, speed_table

    stored = arguments.compare and Speed.load(arguments.compare)
    arguments.bindings += [f"run.batch_size = {arguments.batch}"] if arguments.batch else []
    arguments.bindings += ["run.compile = True"] if arguments.compile else []
    request = _request(arguments)
    groups = cases_of(
        request,
        objectives=arguments.objectives,
        backbones=arguments.backbone,
        precisions=arguments.precision,
        derivatives=arguments.derivative,
    )
    out = arguments.out or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}"
    speed = run_bench(request, groups, out, turns=arguments.repeats, memory=not arguments.no_memory)
    print(speed_table(speed))
    if arguments.json:
        arguments.json.write_text(speed.json())
    if stored:
        lines, grown = compare(speed, stored)
        print("\n".join(["", *lines]))
        if grown:
            raise SystemExit(f"{len(grown)} ratios have grown")


def _export(arguments: argparse.Namespace) -> None:
    from benchmarks.export import export_file, export_run

    if arguments.run.is_dir():
        where = export_run(arguments.run, arguments.out)
    else:
        where = export_file(arguments.run, arguments.out, arguments.layout, arguments.num_heads)
    print(f"{where}: model.safetensors, config.json, README.md")


def _consolidate(arguments: argparse.Namespace) -> None:
    from trainers.zero_checkpoint import consolidate

    consolidate(arguments.checkpoint, arguments.out, arguments.ema)
    print(arguments.out)


def _send(arguments: argparse.Namespace) -> None:
    from benchmarks.mlflow_copy import send

    for folder, state in send(arguments.folder, arguments.tracking_uri):
        print(f"{folder}: {state}")


if __name__ == "__main__":
    sys.exit(main())
