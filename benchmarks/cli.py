"""The command line: objective-zoo COMMAND, see commands/.

Nothing heavy is imported before the arguments are read, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from benchmarks.commands import bench, check, encode, evaluate, grid, plan, report, run, weights
from benchmarks.threads import choose_threads

EXPECTED = (ValueError, KeyError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what was asked, 1 if a run failed, 2 for a request in error."""
    try:
        try:
            status = _main(argv)
        finally:
            sys.stdout.flush()
        if "RANK" in os.environ:  # one of several: DeepSpeed's threads may abort a normal exit
            sys.stderr.flush()
            os._exit(status)
        return status
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    choose_threads()
    # Given by torch itself at the first forward-mode derivative.
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", FutureWarning)
    arguments = _parser().parse_args(argv)
    from benchmarks.console import concealing
    from registry.secrets import concealed

    given = ["objective-zoo", *(sys.argv[1:] if argv is None else argv)]
    arguments.words = [concealed(word) for word in given]  # to be shown, and handed on
    with concealing():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from benchmarks.console import show_output

    try:
        with show_output():
            arguments.command(arguments)
    except BrokenPipeError:
        raise
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
            return 1
        from registry.configuration.gin_errors import message_of

        hint = "" if isinstance(error, EXPECTED) else "\nobjective-zoo --traceback ... shows where"
        print(f"error: {message_of(error)}{hint}", file=sys.stderr)
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


class _Parser(argparse.ArgumentParser):
    """Shows no secret that stands among the words it cannot read."""

    def error(self, message: str) -> NoReturn:
        from registry.secrets import concealed

        super().error(concealed(message))


class _Version(argparse.Action):
    """Looks the version up when it is asked for; importlib.metadata takes a while to import."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from importlib.metadata import version

        print(f"objective-zoo {version('objective-zoo')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="objective-zoo",
        description="Compare training objectives for one- and few-step generation.",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (run, grid, evaluate, report, check, plan, bench, encode, weights):
        module.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
