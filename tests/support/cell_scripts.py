"""Scripts that stand in for cells: a launcher is handed `run_cell`, as it is handed ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Told:
    """What `Ended` of registry.protocols says, without torch, which takes a process seconds."""

    name: str
    status: str
    reason: str = ""


def run_cell(folder: Path) -> Any:
    """Run script.py of the folder, which may say in `ended` how its cell ended."""
    return _run(folder, Told)


def run_whole_cell(folder: Path) -> Any:
    """The same for a launcher that is given the answer itself, and not its fields."""
    from registry.protocols import Ended

    return _run(folder, Ended)


def _run(folder: Path, kind: Any) -> Any:
    scope = {"folder": folder, "Ended": kind, "name": folder.name}
    exec((folder / "script.py").read_text(), scope)
    return scope.get("ended", kind(folder.name, "finished"))
