"""Networks that were trained before: by a run, exported, or by a public code.

folder with result.json    a finished run of ours
folder with config.json    an exported network (exported.py)
.safetensors, .pt, ...     a public checkpoint (backbones/imports.py), read without executing it
"""

from __future__ import annotations

from pathlib import Path

from backbones.imports import Imported, import_weights
from backbones.network import FlowNetwork
from benchmarks.exported import CONFIG, load_exported
from benchmarks.public_files import SUFFIXES, read_state
from benchmarks.results import RESULT


def is_run(path: Path) -> bool:
    """Whether this is one of our runs, or a folder that may have been meant as one."""
    if path.suffix in SUFFIXES and not path.is_dir():
        return False
    return (path / RESULT).exists() or not (path / CONFIG).exists()


def load_pretrained(path: Path, layout: str = "", num_heads: int | None = None) -> FlowNetwork:
    """The network of an exported folder or of a public checkpoint."""
    if path.is_dir():
        return load_exported(path)
    return import_file(path, layout, num_heads).network()


def import_file(path: Path, layout: str = "", num_heads: int | None = None) -> Imported:
    """A public checkpoint, converted; ValueError that names the file and what is wrong."""
    try:
        return import_weights(read_state(path), layout, num_heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
