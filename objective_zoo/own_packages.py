"""The packages of this project, found beside this one whatever the current folder holds.

They have plain names (`benchmarks`, `zoo`, ...), and Python looks into the current folder first in
a notebook and under `python -m`. A folder `benchmarks` there would be taken for ours.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGES = ("registry", "zoo", "backbones", "trainers", "benchmarks")
ROOT = Path(__file__).resolve().parents[1]


class _Beside:
    """Finds our packages beside this one, and nothing else."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in PACKAGES else None


def put_first() -> None:
    """From now on our packages are found before others of their names.

    Raises ImportError if another package has taken one of the names already.
    """
    for name in PACKAGES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.modules and not (file and Path(file).resolve().is_relative_to(ROOT)):
            raise ImportError(
                f"a module {name!r} is loaded already ({file or 'a folder'}), and objective_zoo "
                f"has a package of this name in {ROOT}. Import objective_zoo first, or rename "
                "the other one"
            )
    if _Beside not in sys.meta_path:
        sys.meta_path.insert(0, _Beside)
