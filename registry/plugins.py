"""Where parts come from: installed packages, this project's among them, and single Python files.

A package declares its modules in its pyproject.toml; importing them registers their parts:

    [project.entry-points."objective_zoo.plugins"]
    my_losses = "my_package.losses"
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

GROUP = "objective_zoo.plugins"
BUILT_IN = "objective_zoo"  # the name of our own entry point in that group


def load_plugins() -> tuple[str, ...]:
    """Import the built-in parts and every plug-in that is installed; returns the plug-ins' names.

    The built-in parts are imported first, so that the error about a name that is taken twice names
    the plug-in.
    """
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name != BUILT_IN)
    if not (found and found[0].name == BUILT_IN):
        raise ImportError(
            "the built-in parts are not installed: this installation of objective-zoo is older "
            "than its code. Install it again: pip install -e . in a checkout, or "
            "pip install --force-reinstall objective-zoo"
        )
    names = []
    for entry in found:
        try:
            entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else "unknown"
            raise ImportError(
                f"the plug-in {entry.name!r} of the package {owner!r} ({entry.value}) cannot be "
                f"loaded: {type(error).__name__}: {error}\nRepair it, or: pip uninstall {owner}"
            ) from error
        names.append(entry.name)
    return tuple(names[1:])


def import_file(path: str | Path) -> ModuleType:
    """Import a Python file by its path; a file inside a package gets its full dotted name."""
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise FileNotFoundError(f"no Python file {str(path)!r} (looked at {file})")
    folder, parts = file.parent, [file.stem]
    while (folder / "__init__.py").exists():
        folder, parts = folder.parent, [folder.name, *parts]
    name = ".".join(parts)
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{file.name!r} cannot be imported: {name!r} is no Python name; rename it")
    make_importable(parts[0], folder)
    return importlib.import_module(name)


def make_importable(name: str, folder: Path) -> None:
    """Append the folder to the path; ValueError if its module `name` is hidden by another one."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    own = [f for f in (folder / f"{name}.py", folder / name / "__init__.py") if f.is_file()]
    if own:
        found = _origin(name)
        if found not in own:
            raise ValueError(
                f"{own[0]} cannot be imported: the name {name!r} already means "
                f"{found or 'a built-in module'}; rename the file"
            )


def _origin(name: str) -> Path | None:
    loaded = sys.modules.get(name)
    spec = getattr(loaded, "__spec__", None) if loaded else importlib.util.find_spec(name)
    origin = spec.origin if spec else getattr(loaded, "__file__", None)
    return Path(origin).resolve() if origin and origin not in ("built-in", "frozen") else None
