"""Python code that comes with a folder of a run: it is imported only where somebody has consented.

A gin file may say `import my_loss`, and to import a file is to execute it. Whoever runs a gin file
of their own wants that. Whoever opens a folder of somebody else wants its weights, and its code may
do anything. So the configuration that lies in such a folder goes through `check`: what it imports
must be imported already, by an installed plug-in, by `--import FILE` or by the caller's own Python.
Then nothing is executed. `--trust-code` consents to the rest.

    code.json    in the folder of a run: the SHA-256 of its own modules, as it imported them
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from registry.folders import file_sha256

CODE = "code.json"
DYNAMIC = "__gin__"  # gin's module that lets a file refer to any function of any module

log = logging.getLogger(__name__)


def check(path: Path, modules: Iterable[str], folders: Iterable[Path]) -> None:
    """ValueError if the gin file at `path` imports a module that is not imported already.

    The error names the files that would be executed, with their hashes, and what to do instead.
    """
    unknown = [name for name in dict.fromkeys(modules) if name not in sys.modules]
    if not unknown:
        return
    recorded = recorded_hashes(path.parent)
    lines = []
    for name in unknown:
        if name.split(".")[0] == DYNAMIC:
            lines.append(f"{name}: with it the file may call any function of Python")
            continue
        files = _files(name.split(".")[0], [*folders, path.parent])
        lines += [f"{name}: {_described(file, recorded)}" for file in files] or [
            f"{name}: {_elsewhere(name)}"
        ]
    raise ValueError(
        f"{path} imports code that came with it, and to import code is to execute it. Nothing was "
        "imported:\n  " + "\n  ".join(lines) + "\nIf you have read it and trust it, say "
        "--trust-code, or give your own copy with --import FILE (in Python: load(folder, "
        "trust_code=True), or import the module before). To look at the weights without the code, "
        "open model.safetensors: it holds numbers and names alone. Who trusts the code can also "
        "make a folder that you can open without it, by `objective-zoo export`. That does not "
        "help where the backbone or the heads of the network are defined in this code"
    )


def recorded_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of the modules that a run has imported, by file; empty if none was recorded."""
    try:
        found = json.loads((folder / CODE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(name): digest for name, digest in found.items() if isinstance(digest, str)}


def hashes(files: Iterable[Path], folders: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of these files and of all imported modules beside them, by name in the folder."""
    roots = [folder.resolve() for folder in folders]
    modules = list(sys.modules) if roots else []  # thousands, of which each is looked up on disk
    loaded = [file for module in modules if (file := _file_of(module)) is not None]
    beside = [file for file in loaded if file.parent in roots]
    found = {}
    for file in dict.fromkeys([*files, *beside]):
        root = next((root for root in roots if file.is_relative_to(root)), file.parent)
        found[file.relative_to(root).as_posix()] = file_sha256(file)
    return dict(sorted(found.items()))


def warn_of_changes(folder: Path) -> None:
    """Warn of each module that is imported and differs from what the run in `folder` imported."""
    for name, then in recorded_hashes(folder).items():
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        file = _file_of(module)
        if file is not None and (now := file_sha256(file)) != then:
            log.warning(
                "%s has changed since the run in %s was made: its sha256 was %s and is %s",
                *(file, folder, then, now),
            )


def folder_of(name: str) -> Path | None:
    """The folder that an imported module or package of this name has come from, if it is a file."""
    file = _file_of(name)
    if file is None:
        return None
    return file.parent.parent if file.name == "__init__.py" else file.parent


def _files(name: str, folders: Iterable[Path]) -> list[Path]:
    """The files in the first of the folders that has the module."""
    for folder in folders:
        if (folder / name / "__init__.py").is_file():
            return sorted((folder / name).rglob("*.py"))
        if (folder / f"{name}.py").is_file():
            return [folder / f"{name}.py"]
    return []


def _described(file: Path, recorded: Mapping[str, str]) -> str:
    now = file_sha256(file)
    same = [then for name, then in recorded.items() if file.as_posix().endswith(f"/{name}")]
    if not same:
        return f"{file}, sha256 {now}; no hash of it was recorded when the run was made"
    if now in same:
        return f"{file}, sha256 {now}, as recorded when the run was made"
    return f"{file}, sha256 {now}; IT HAS CHANGED since the run was made, when it was {same[0]}"


def _elsewhere(name: str) -> str:
    top = name.split(".")[0]
    spec = importlib.util.find_spec(top) if top not in sys.modules else None
    if top in sys.modules or (spec and spec.origin):
        where = spec.origin if spec else getattr(sys.modules[top], "__file__", None)
        return f"a module of this Python ({where}) that no installed plug-in imports"
    return "there is no such file here"


def file_of(module: str) -> str:
    """The path of the file of an imported module; '' for one that is no file."""
    return str(_file_of(module) or "")


def _file_of(module: str) -> Path | None:
    file = getattr(sys.modules.get(module), "__file__", None)
    path = Path(file).resolve() if isinstance(file, str) else None
    return path if path and path.suffix == ".py" and path.is_file() else None
