"""objective-zoo report, and send: recorded runs as pages, and to an MLflow store."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.commands.arguments import Commands


def add_to(commands: Commands) -> None:
    report = commands.add_parser("report", help="recorded runs as a page, tables and figures")
    report.add_argument("runs", nargs="+", metavar="RUN", help="a folder, or an MLflow run id")
    report.add_argument(
        "--out", type=Path, required=True, help="folder of report.html and the rest"
    )
    report.add_argument("--baseline", default="", help="row to compare with; default flow_matching")
    report.add_argument("--force", action="store_true", help="show rows that cannot be compared")
    report.add_argument(
        "--tracking-uri", default="", help="MLflow store of the run ids; default runs/mlflow.db"
    )
    report.set_defaults(command=_report)

    send = commands.add_parser("send", help="send records to MLflow that could not be sent before")
    send.add_argument("folder", type=Path, help="the folder of a run or of a comparison")
    send.add_argument("--tracking-uri", help="default: the store that the run was meant for")
    send.set_defaults(command=_send)


def _report(arguments: argparse.Namespace) -> None:
    from benchmarks.report import write_report
    from registry.folders import check_output

    out = arguments.out
    check_output(out, "--out", folder=True)
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


def _send(arguments: argparse.Namespace) -> None:
    from benchmarks.records.mlflow_sync import send

    for folder, state in send(arguments.folder, arguments.tracking_uri):
        print(f"{folder}: {state}")
