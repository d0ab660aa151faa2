"""objective-zoo plan: does a run fit, with which micro-batch, and how long does it take."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.commands.arguments import Commands, add_rehearsal, add_request, request_of


def add_to(commands: Commands) -> None:
    plan = commands.add_parser("plan", help="does a run fit, with which micro-batch, how long")
    add_request(plan)
    plan.add_argument("--gpus", type=int, required=True, help="number of GPUs of all machines")
    plan.add_argument(
        "--memory", required=True, metavar="SIZE", help="memory of each GPU, such as 80GB"
    )
    plan.add_argument(
        "--stage",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3],
        choices=range(4),
        help="stages of ZeRO",
    )
    plan.add_argument("--tflops", type=float, default=0.0, help="speed that each GPU reaches")
    plan.add_argument(
        "--images-per-second",
        type=float,
        default=0.0,
        metavar="N",
        help="speed of all GPUs together",
    )
    plan.add_argument(
        "--shape", type=int, nargs="+", default=[], help="shape of the data, such as 4 32 32"
    )
    plan.add_argument("--classes", type=int, help="number of classes; 0: no labels")
    add_rehearsal(plan)
    plan.add_argument("--cpu", action="store_true", help="plan for processes on CPUs")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    plan.set_defaults(command=_plan, tracking_uri=None)


def _plan(arguments: argparse.Namespace) -> None:
    from benchmarks.planning.predict import Machine, predict, read_memory
    from benchmarks.planning.rehearsal import rehearse_here
    from benchmarks.planning.table import planner_table
    from registry.folders import check_output

    if arguments.json:
        check_output(arguments.json, "--json")
    machine = Machine(
        gpus=arguments.gpus,
        memory=read_memory(arguments.memory),
        tflops=arguments.tflops,
        images_per_second=arguments.images_per_second,
        host=arguments.cpu,
    )
    request = request_of(arguments)
    found = predict(request, machine, arguments.stage, arguments.shape, arguments.classes)
    if arguments.rehearsal and not (arguments.shape or arguments.classes):
        rehearse_here(request)
    print(planner_table(found, machine))
    if arguments.json:
        text = json.dumps([prediction.json() for prediction in found], indent=1)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
