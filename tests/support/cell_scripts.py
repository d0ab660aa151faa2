"""Scripts that stand in for cells: a launcher is handed `run_cell`, as it is handed ours."""

from __future__ import annotations

from pathlib import Path

from registry.protocols import Ended


def run_cell(folder: Path) -> Ended:
    """Run script.py of the folder, which may say in `ended` how its cell ended."""
    scope = {"folder": folder, "Ended": Ended, "name": folder.name}
    exec((folder / "script.py").read_text(), scope)
    return scope.get("ended", Ended(folder.name, "finished"))
