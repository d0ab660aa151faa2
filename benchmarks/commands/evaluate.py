"""list, check, evaluate, report, plan and bench."""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

from benchmarks.commands.arguments import (
    Commands,
    add_bindings,
    add_request,
    add_weights,
    request_of,
)
from benchmarks.launchers.slurm import take_place


def add_to(commands: Commands) -> None:
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

    _add_plan(commands.add_parser("plan", help="does a run fit, with which micro-batch, how long"))
    _add_bench(commands.add_parser("bench", help="what a step costs beside flow matching"))


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
    add_weights(parser)
    add_bindings(parser, "euler.shift = 2.0")
    parser.set_defaults(command=_evaluate)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", default=Path("bench.gin"), help="a gin file")
    parser.add_argument("--objectives", nargs="+", default=[], metavar="ARM", help="default: all")
    parser.add_argument("--backbone", nargs="+", default=[], help="default: the file's own")
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="fp32, bf16")
    parser.add_argument(
        "--derivative", nargs="+", default=["one_pass"], help="such as one_pass dual"
    )
    parser.add_argument("--batch", type=int, help="rows of a step; default: the file's own")
    parser.add_argument("--repeats", type=int, default=5, help="turns of 3 steps")
    parser.add_argument("--compile", action="store_true", help="networks by torch.compile")
    parser.add_argument("--published", action="store_true", help="MeanFlow as in its paper, too")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--out", type=Path, help="folder of the record; default runs/bench-DATE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result, to compare with")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="fail if a ratio has grown")
    parser.add_argument("--tracking-uri", help="MLflow store; default sqlite:///runs/mlflow.db")
    add_bindings(parser, "dit.dim = 768")
    parser.set_defaults(command=_bench, arm="")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add_request(parser)
    parser.add_argument("--gpus", type=int, required=True, help="how many, of all machines")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="of each, such as 80GB")
    parser.add_argument(
        "--stage", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4), help="of ZeRO"
    )
    parser.add_argument("--tflops", type=float, default=0.0, help="that each GPU reaches")
    parser.add_argument(
        "--images-per-second", type=float, default=0.0, metavar="N", help="of all GPUs together"
    )
    parser.add_argument("--shape", type=int, nargs="+", default=[], help="of the data: 4 32 32")
    parser.add_argument("--classes", type=int, help="of the data, 0 without labels")
    parser.add_argument("--cpu", action="store_true", help="processes on CPUs in place of GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for machines")
    parser.set_defaults(command=_plan, tracking_uri=None)


def _list(arguments: argparse.Namespace) -> None:
    from benchmarks.commands.catalogue import catalogue

    print(catalogue(arguments.kind, arguments.file, bibtex=arguments.bibtex))


def _check(arguments: argparse.Namespace) -> None:
    from benchmarks.conformance import check

    tell = (lambda line: None) if arguments.json else partial(print, flush=True)
    report = check(arguments.name, arguments.file, mutations=arguments.mutations, tell=tell)
    if arguments.json:
        print(report.json())
    if problems := report.problems():
        raise SystemExit(f"{arguments.name} fails: {', '.join(problems)}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from trainers import ranks

    take_place(os.environ)
    if arguments.ranks > 1 and not ranks.launched():
        from benchmarks.launchers.ranks import start

        again = "The same command goes on with the blocks that it has"
        if status := start(arguments.words[1:], arguments.ranks, again=again):
            raise SystemExit(status)
        return
    from benchmarks.evaluation.protocol import evaluate_run, table
    from benchmarks.evaluation.request import EvaluationRequest

    request = EvaluationRequest(
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
        weights=arguments.weights,
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


def _plan(arguments: argparse.Namespace) -> None:
    from benchmarks.planning.predict import Machine, predict, read_memory
    from benchmarks.planning.table import planner_table

    machine = Machine(
        gpus=arguments.gpus,
        memory=read_memory(arguments.memory),
        tflops=arguments.tflops,
        images_per_second=arguments.images_per_second,
        host=arguments.cpu,
    )
    found = predict(
        request_of(arguments), machine, arguments.stage, arguments.shape, arguments.classes
    )
    print(planner_table(found, machine))
    if arguments.json:
        text = json.dumps([prediction.json() for prediction in found], indent=1)
        arguments.json.write_text(text + "\n")


def _bench(arguments: argparse.Namespace) -> None:
    from benchmarks.speed.bench import run_bench
    from benchmarks.speed.cases import cases_of
    from benchmarks.speed.table import Speed, compare, speed_table

    stored = arguments.compare and Speed.load(arguments.compare)
    arguments.bindings += [f"run.batch_size = {arguments.batch}"] if arguments.batch else []
    arguments.bindings += ["run.compile = True"] if arguments.compile else []
    request = request_of(arguments)
    groups = cases_of(
        request,
        objectives=arguments.objectives,
        backbones=arguments.backbone,
        precisions=arguments.precision,
        derivatives=arguments.derivative,
        published=arguments.published,
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
