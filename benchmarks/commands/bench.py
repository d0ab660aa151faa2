"""objective-zoo bench: what a step costs beside flow matching."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.commands.arguments import (
    Commands,
    add_bindings,
    add_store,
    add_trust,
    request_of,
)


def add_to(commands: Commands) -> None:
    bench = commands.add_parser("bench", help="what a step costs beside flow matching")
    bench.add_argument("file", type=Path, nargs="?", default=Path("bench.gin"), help="a gin file")
    bench.add_argument(
        "--objectives", nargs="+", default=[], metavar="ARM", help="arms; default: all"
    )
    bench.add_argument("--backbone", nargs="+", default=[], help="backbones; default: the file's")
    bench.add_argument("--precision", nargs="+", default=["fp32"], help="fp32 or bf16, or both")
    bench.add_argument(
        "--derivative", nargs="+", default=["one_pass"], help="derivatives, such as one_pass dual"
    )
    bench.add_argument("--batch", type=int, help="rows of a step; default: the file's own")
    bench.add_argument("--repeats", type=int, default=5, help="number of turns of 3 steps")
    bench.add_argument("--compile", action="store_true", help="compile the networks")
    bench.add_argument(
        "--published", action="store_true", help="also time MeanFlow as in its paper"
    )
    bench.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    bench.add_argument("--out", type=Path, help="folder of the record; default runs/bench-DATE")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the result, for --compare")
    bench.add_argument("--compare", type=Path, metavar="FILE", help="fail if a ratio has grown")
    add_store(bench)
    add_bindings(bench, "dit.dim = 768")
    add_trust(bench)
    bench.set_defaults(command=_bench, only=[])


def _bench(arguments: argparse.Namespace) -> None:
    from benchmarks.speed.bench import run_bench
    from benchmarks.speed.cases import cases_of
    from benchmarks.speed.table import Speed, compare, speed_table
    from registry.folders import check_output

    if arguments.json:
        check_output(arguments.json, "--json")
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
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(speed.json())
    if stored:
        lines, grown = compare(speed, stored)
        print("\n".join(["", *lines]))
        if grown:
            raise SystemExit(f"{len(grown)} ratios have grown")
