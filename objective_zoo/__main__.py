"""`python -m objective_zoo` is the command line, also under torchrun and DeepSpeed's launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from objective_zoo.own_packages import ROOT

if __name__ == "__main__":
    # What lies in the current folder is not to be imported, as with the script `objective-zoo`.
    if not sys.flags.safe_path and Path(sys.path[0] or ".").resolve() != ROOT:
        del sys.path[0]
    from benchmarks.cli import main

    sys.exit(main())
