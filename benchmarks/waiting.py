"""`python -P -m benchmarks.waiting`: how threads wait, on a busy machine; see speed/waiting.py."""

from __future__ import annotations

import argparse

from benchmarks.markdown import markdown
from benchmarks.speed import waiting


def main() -> None:
    about = (waiting.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -P -m benchmarks.waiting", description=about)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each setting")
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        from registry.plugins import load_plugins

        load_plugins()
        print(waiting.milliseconds_per_step(given.one))
        return
    found = waiting.measure(given.seconds, given.turns)
    rows = [
        [name, *(f"{times[name]:.0f}" for times in found.values())] for name in waiting.SETTINGS
    ]
    print(markdown(["ms of a step", *(f"{busy} busy processes" for busy in found)], rows))


if __name__ == "__main__":
    main()
