"""Folders that are whole or not there: written aside, synced, then renamed into place.

Beside its other files such a folder has a manifest of their sizes and SHA-256.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.folders import file_in
from trainers.checkpoints.whole_files import file_sha256, read_json, sync, write_json

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class BrokenCheckpoint(ValueError):
    """A checkpoint that is torn, truncated, edited or of another run.

    The message says which file and how.
    """


def aside_of(target: Path) -> Path:
    """Where a folder is written before it is in its place.

    The name is the same in all processes of a run, which write into it together.
    """
    return target.with_name(f".{target.name}.partial")


def begin(aside: Path) -> None:
    """Make an empty folder to write into."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def publish(aside: Path, target: Path, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Put a folder whose files are synced in its place, with a manifest of their fingerprints."""
    write_json(aside / MANIFEST, marks)
    discard(target)
    aside.rename(target)
    sync(target.parent)


def verify(path: Path) -> None:
    """Raise BrokenCheckpoint, naming the file, unless all files are as they were written.

    The folder holds what its manifest lists and nothing else but hidden files. A name that leads
    out of the folder is refused, and so is a link that does.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError as problem:
        raise BrokenCheckpoint(str(problem)) from problem
    try:
        expected = {name: (int(m["size"]), str(m["sha256"])) for name, m in manifest.items()}
    except (ValueError, TypeError, KeyError, OverflowError) as problem:
        raise BrokenCheckpoint(
            f"{path / MANIFEST} cannot be read: it does not say size and SHA-256 of every file"
        ) from problem
    if not expected:
        raise BrokenCheckpoint(f"{path / MANIFEST} lists no files")
    there = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    if unknown := sorted(there - expected.keys() - {MANIFEST}):
        raise BrokenCheckpoint(
            f"{path / unknown[0]} is not in {MANIFEST}, so that nobody can tell whether it is as "
            "it was written. If it is not a part of the checkpoint, put it elsewhere"
        )
    for name, (size, digest) in expected.items():
        try:
            file = file_in(path, name)
        except ValueError as problem:
            raise BrokenCheckpoint(str(problem)) from None
        if not file.is_file():
            raise BrokenCheckpoint(f"{file} is missing")
        if file.stat().st_size != size:
            raise BrokenCheckpoint(f"{file} has {file.stat().st_size} bytes instead of {size}")
        try:
            found = file_sha256(file)
        except OSError as problem:
            raise BrokenCheckpoint(f"{file} cannot be read: {problem.strerror}") from problem
        if found != digest:
            raise BrokenCheckpoint(f"{file} was changed after it was written (SHA-256 differs)")


def fingerprint(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def discard(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that no part of one is found under its name."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.discarded")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left of folders that they wrote or discarded.

    Only a process that alone may write in the folder may call it.
    """
    for left in [*folder.glob(".*.partial"), *folder.glob(".*.discarded")]:
        log.info("removing %s, which a process that ended early has left", left)
        shutil.rmtree(left)
