"""`python -P -m benchmarks.waiting`: how threads wait, ms of a step; see speed/waiting.py."""

from __future__ import annotations

import argparse

from benchmarks.markdown import markdown
from benchmarks.speed import waiting
from benchmarks.threads import num_cores


def main() -> None:
    about = (waiting.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -P -m benchmarks.waiting", description=about)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each setting")
    usual = [0, 1, num_cores(), 2 * num_cores()]
    parser.add_argument(
        "--busy", type=int, nargs="+", default=usual, help="numbers of busy processes beside it"
    )
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        from registry.plugins import load_plugins

        load_plugins()
        print(waiting.milliseconds_per_step(given.one))
        return
    head = ["busy processes", *waiting.SETTINGS]
    print(markdown(head, [[""] * len(head)]).rpartition("\n")[0])
    for busy, times in waiting.measure(given.seconds, given.turns, given.busy):
        row = [str(busy), *(f"{times[name]:.0f}" for name in waiting.SETTINGS)]
        print(markdown(head, [row]).rpartition("\n")[2], flush=True)


if __name__ == "__main__":
    main()
