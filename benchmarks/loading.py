"""`python -P -m benchmarks.loading`: how fast the processes of a run read; see speed/loading.py."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.speed import loading
from benchmarks.speed.loading import SHARD_ROWS, Work, measure, write_noise
from registry.plugins import load_plugins


def main() -> None:
    about = (loading.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -P -m benchmarks.loading", description=about)
    parser.add_argument("folder", type=Path, nargs="?", help="latents or pictures; default: noise")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024, help="rows of all processes together")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resolution", type=int, default=256, help="side of pictures")
    parser.add_argument(
        "--rows", type=int, default=8 * SHARD_ROWS, help="number of latents of noise"
    )
    given = vars(parser.parse_args())
    load_plugins()
    rows, folder = given.pop("rows"), given.pop("folder")
    with tempfile.TemporaryDirectory() as made:
        if folder is None:
            write_noise(Path(made), rows)
        work = Work(folder=folder or Path(made), **given)
        for name, rates in zip(("reading", "plain copy"), measure(work), strict=True):
            print(f"{name:<10} {rates.wall:>12,.0f} images/s {rates.cpu:>12,.0f} per CPU second")


if __name__ == "__main__":
    main()
