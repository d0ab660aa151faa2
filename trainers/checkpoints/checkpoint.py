"""Writes and reads checkpoints, each of which is whole or not there.

Training waits only until a copy is in memory; files are written and hashed while it goes on.

    checkpoints/step_00001000/
        net.safetensors  ema_0.9999.safetensors  teacher_<field>.safetensors  optimizer.pt
        state.json       step, images and seconds so far, and what made them
        manifest.json    size and SHA-256 of every other file

zero_engine writes other files (zero/checkpoint.py), and several processes write together. If the
files of a folder do not fit its manifest, a warning names the folder and the one before it is used.
Loading executes nothing: weights are safetensors, the optimizer is read with `weights_only`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from trainers import ranks
from trainers.checkpoints.whole_files import sync, write_json
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

_NAME = re.compile(r"step_(\d{8,})\Z")

log = logging.getLogger(__name__)


class PendingCheckpoint:
    """A checkpoint that is being written under state.folder while training goes on.

    When it is made, every process copies its part to memory, and a thread of the process writes
    it. When all processes have `written` theirs, every one calls `finish`. If the disk fails, all
    of them raise OSError, and older checkpoints stay as they are.
    """

    def __init__(self, state: TrainState):
        self.step = state.step
        self._target = folder_of(state) / f"step_{state.step:08d}"
        self._partial = aside_of(self._target)
        self._counters = _counters(state)
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
        state = self._partial / "state.json"
        write_json(state, self._counters)
        publish(self._partial, self._target, manifest | {state.name: fingerprint(state)})


def _marked(write: Callable[[], Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """Write this process's files; returns size and hash of each by its name."""
    files = write()
    for file in files:
        sync(file)
    return {file.name: fingerprint(file) for file in files}


def restore(state: TrainState) -> None:
    """Continue from the newest whole checkpoint under state.folder; from the start without one."""
    path = ranks.from_leader(ranks.together(lambda: _latest_of(state), BrokenCheckpoint))
    if path is None:
        log.debug("no checkpoint in %s: starting from the beginning", folder_of(state))
        return
    ranks.together(lambda: state.engine.load(path), ValueError, OSError)
    saved = json.loads((path / "state.json").read_text())
    for name, now in (("seed", state.seed), ("batch_size", state.batch_size)):
        if saved[name] != now:
            log.warning(
                "%s was made with %s = %s and goes on with %s, so it is another run now",
                path, name, saved[name], now,
            )  # fmt: skip
    state.step, state.images = saved["step"], saved["images"]
    state.clock.elapsed = saved["seconds"]
    state.resumed = path


def _latest_of(state: TrainState) -> Path | None:
    return latest(folder_of(state)) if ranks.leads() else None


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None if there is none at all.

    A warning names each broken one. BrokenCheckpoint if all of them are.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            verify(path)
            return path
        except BrokenCheckpoint as problem:
            log.warning("checkpoint refused, trying the one before it: %s", problem)
    if found:
        raise BrokenCheckpoint(
            f"none of the {len(found)} checkpoints in {folder} is whole. "
            "Remove them to start from the beginning"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders, oldest first, whole or not."""
    found = [p for p in folder.iterdir() if _NAME.match(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def folder_of(state: TrainState) -> Path:
    if state.folder is None:
        raise ValueError("checkpoints and resume need a folder: fit(folder=...)")
    return state.folder / "checkpoints"


def _counters(state: TrainState) -> dict[str, Any]:
    return {
        "version": 1,
        "step": state.step,
        "images": state.images,
        "seconds": state.seconds,
        "seed": state.seed,
        "batch_size": state.batch_size,
    }
