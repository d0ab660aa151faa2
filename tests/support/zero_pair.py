"""What the two processes of test_zero.py do, one after the other: their start costs most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zero_trained_work
import zero_work

PARTS = {
    "parity": zero_work.parity,
    "resume": zero_work.resume,
    "trained": zero_trained_work.parity,
}


def everything(folder: Path) -> dict[str, Any]:
    found = {}
    for name, part in PARTS.items():
        (folder / name).mkdir(exist_ok=True)
        found[name] = part(folder / name)
    return found


if __name__ == "__main__":
    zero_work.main(globals())
