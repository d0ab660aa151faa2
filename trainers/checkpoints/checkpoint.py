"""Writes and reads checkpoints, each of which is whole or not there.

Training waits only until a copy is in memory; files are written and hashed while it goes on.

    checkpoints/step_00001000/
        net.safetensors  ema_0.9999.safetensors  teacher_<field>.safetensors  optimizer.pt
        state.json       step, images and seconds so far, and what made them, with the SHA-256 of
                         the weights of features, which never change
        manifest.json    size and SHA-256 of every other file

zero_engine writes other files (zero/checkpoint.py), and several processes write together. If a
folder cannot be read, does not fit its manifest or is of another network, a warning names it, and
the one before it is used; a checkpoint is read whole before anything of it is put in its place.
Loading executes nothing: weights are safetensors, the optimizer is read with `weights_only`.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from trainers import ranks
from trainers.checkpoints.whole_files import read_json, sync, write_json
from trainers.checkpoints.whole_folders import (
    BrokenCheckpoint,
    aside_of,
    begin,
    discard,
    fingerprint,
    publish,
    verify,
)
from trainers.state import TrainState

STATE, VERSION = "state.json", 1
_NAME = re.compile(r"step_(\d{8,})\Z")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedCounters:
    """The content of state.json: how far a run was, and what made it so."""

    step: int
    images: int
    seconds: float
    seed: int
    batch_size: int

    @classmethod
    def of(cls, state: TrainState) -> SavedCounters:
        return cls(**{field.name: getattr(state, field.name) for field in fields(cls)})

    @classmethod
    def load(cls, path: Path) -> SavedCounters:
        """BrokenCheckpoint, naming the file, unless every counter is a number that can be."""
        try:
            saved = read_json(path)
        except ValueError as problem:
            raise BrokenCheckpoint(str(problem)) from problem
        if (version := saved.get("version")) != VERSION:
            raise BrokenCheckpoint(
                f"{path} has the version {version!r}, and this objective-zoo reads {VERSION}: go "
                "on with the one that wrote it"
            )
        found: dict[str, Any] = {field.name: saved.get(field.name) for field in fields(cls)}
        for name, value in found.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole or (name == "seconds" and isinstance(value, float))):
                raise BrokenCheckpoint(f"{path} has {name} = {value!r}, which is no whole number")
            if name != "seed" and not 0 <= value < math.inf:
                raise BrokenCheckpoint(f"{path} has {name} = {value!r}, which cannot be")
        return cls(**found)


class PendingCheckpoint:
    """A checkpoint that is being written under state.folder while training goes on.

    When it is made, every process copies its part to memory, and a thread of the process writes
    it. When all processes have `written` theirs, every one calls `finish`. If the disk fails, all
    of them raise OSError, and older checkpoints stay as they are.
    """

    def __init__(self, state: TrainState):
        self.step = state.step
        self._target = folder_of(state) / _name(state.step)
        self._partial = aside_of(self._target)
        self._content = {"version": VERSION, **asdict(SavedCounters.of(state))}
        if state.features:
            self._content["features"] = state.features
        ranks.together(self._begin, OSError)
        write = state.engine.save(self._partial)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._marks = self._pool.submit(_marked, write)

    @property
    def written(self) -> bool:
        """Whether this process has written its part or has failed to write it."""
        return self._marks.done()

    def finish(self, keep: int) -> Path:
        """Wait for all processes, put it in its place, and keep the newest `keep` checkpoints."""
        try:
            parts = ranks.gathered(ranks.together(self._marks.result, OSError))
            manifest = {name: mark for part in parts for name, mark in part.items()}
            ranks.together(partial(self._complete, manifest), OSError)
        except BaseException:
            self.drop()
            raise
        self._pool.shutdown()
        if ranks.leads():
            folder = self._target.parent
            for old in [c for c in checkpoints(folder) if c <= self._target][:-keep]:
                discard(old)
        return self._target

    def drop(self) -> None:
        """Give it up, and delete the files that are written so far."""
        self._pool.shutdown()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _begin(self) -> None:
        if ranks.leads():
            begin(self._partial)

    def _complete(self, manifest: dict[str, dict[str, Any]]) -> None:
        if not ranks.leads():
            return
        for name, mark in manifest.items():
            file = self._partial / name
            if not file.is_file() or file.stat().st_size != mark["size"]:
                raise OSError(
                    f"{file} is not what another process wrote: the folder of a run must be on a "
                    "file system that all its machines share"
                )
        state = self._partial / STATE
        write_json(state, self._content)
        publish(self._partial, self._target, manifest | {state.name: fingerprint(state)})


def _marked(write: Callable[[], Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """Write this process's files; returns size and hash of each by its name."""
    files = write()
    for file in files:
        sync(file)
    return {file.name: fingerprint(file) for file in files}


def restore(state: TrainState) -> None:
    """Continue from the newest usable checkpoint under state.folder; from the start without one.

    A warning names each one that cannot be read or does not fit, and the one before it is tried.
    BrokenCheckpoint, with the newest one's reason, if there are some and none of them can be used.
    """
    found = ranks.from_leader(checkpoints(folder_of(state)) if ranks.leads() else [])
    refused: list[str] = []
    for path in reversed(found):
        try:
            saved = _loaded(state, path)
        except (ValueError, OSError) as problem:
            _refuse(problem)
            refused.append(str(problem))
            continue
        for name, now in (("seed", state.seed), ("batch_size", state.batch_size)):
            if (before := getattr(saved, name)) != now:
                log.warning(
                    "%s was made with %s = %s and goes on with %s, so it is another run now",
                    path, name, before, now,
                )  # fmt: skip
        state.step, state.images = saved.step, saved.images
        state.clock.elapsed = saved.seconds
        state.resumed = path
        return
    if refused:
        raise _none_usable(folder_of(state), refused)
    log.debug("no checkpoint in %s: starting from the beginning", folder_of(state))


def _loaded(state: TrainState, path: Path) -> SavedCounters:
    """Load one checkpoint in all processes, or raise in all of them."""
    ranks.together(lambda: verify(path) if ranks.leads() else None, ValueError)
    saved = ranks.together(partial(SavedCounters.load, path / STATE), ValueError)
    if path.name != _name(saved.step):
        raise BrokenCheckpoint(f"{path / STATE} is of step {saved.step}, not of {path.name}")
    _check_features(state, path / STATE)
    ranks.together(partial(state.engine.load, path), ValueError, OSError)
    return saved


def _check_features(state: TrainState, path: Path) -> None:
    """BrokenCheckpoint if the features of the objective have other weights than they had."""
    had = read_json(path).get("features", {})
    if had != state.features:
        changed = [
            name for name in had | state.features if had.get(name) != state.features.get(name)
        ]
        raise BrokenCheckpoint(
            f"{path} was made with other weights of the objective's {', '.join(changed)}, and what "
            "they compare would be something else. Restore these weights, or start a new run in "
            "another folder"
        )


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None if there is none at all.

    A warning names each broken one. BrokenCheckpoint if all of them are.
    """
    refused = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
            return path
        except BrokenCheckpoint as problem:
            _refuse(problem)
            refused.append(str(problem))
    if refused:
        raise _none_usable(folder, refused)
    return None


def _refuse(problem: Exception) -> None:
    log.warning("checkpoint refused, trying the one before it: %s", problem)


def _none_usable(folder: Path, refused: Sequence[str]) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"none of the {len(refused)} checkpoints in {folder} can be used; the newest one: "
        f"{refused[0]}. Remove them to start from the beginning"
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first, whole or not."""
    found = [p for p in folder.iterdir() if _NAME.match(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def folder_of(state: TrainState) -> Path:
    if state.folder is None:
        raise ValueError("checkpoints and resume need a folder: fit(folder=...)")
    return state.folder / "checkpoints"


def _name(step: int) -> str:
    return f"step_{step:08d}"
