"""Checkpoints that are whole or not there: written aside, synced, then renamed into place.

Training waits for a copy in memory only; files are written and hashed beside it.

    checkpoints/step_00001000/
        net.safetensors  ema_0.9999.safetensors  teacher_<field>.safetensors  optimizer.pt
        state.json       step, images and seconds so far, and what made them
        manifest.json    size and SHA-256 of every other file

zero_engine writes other files (zero_checkpoint.py) and several processes write together. A folder
whose files do not fit its manifest is refused by name, and the one before it is used. Loading
executes nothing: weights are safetensors, the optimizer is read with `weights_only`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers import ranks
from trainers.state import TrainState
from trainers.zero_shards import gathered_state

_NAME = re.compile(r"step_(\d{8,})\Z")
_MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class BrokenCheckpoint(ValueError):
    """A checkpoint that is torn, truncated or edited; the message says which file and how."""


class Saving:
    """A checkpoint on its way to the disk, under state.folder, while training goes on.

    Making one copies what each process holds; a thread of each then writes its part. When all
    have `written`, every process calls `finish`. What fails for the disk's sake raises OSError in
    all of them, with what was there before intact.
    """

    def __init__(self, state: TrainState):
        self.step = state.step
        self._target = folder_of(state) / f"step_{state.step:08d}"
        self._partial = self._target.with_name(f".{self._target.name}.partial")
        self._counters = _counters(state)
        ranks.together(self._begin, OSError)
        write = state.engine.save(self._partial)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._marks = self._pool.submit(_marked, write)

    @property
    def written(self) -> bool:
        """Whether this process has written its part, or failed to."""
        return self._marks.done()

    def finish(self, keep: int) -> Path:
        """Make it one of the last `keep` checkpoints, once every process has written its part."""
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
                _discard(old)
        return self._target

    def drop(self) -> None:
        """Leave nothing of it."""
        self._pool.shutdown()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _begin(self) -> None:
        if ranks.leads():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

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
        _write_json(state, self._counters)
        _write_json(self._partial / _MANIFEST, manifest | {state.name: _fingerprint(state)})
        for path in (state, self._partial / _MANIFEST, self._partial):
            _sync(path)
        _discard(self._target)
        self._partial.rename(self._target)
        _sync(self._target.parent)


def _marked(write: Callable[[], Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """What this process has written, by name: sizes and hashes."""
    files = write()
    for file in files:
        _sync(file)
    return {file.name: _fingerprint(file) for file in files}


def restore(state: TrainState) -> None:
    """Continue from the newest whole checkpoint under state.folder; without any, from the start."""
    path = ranks.from_leader(ranks.together(lambda: _latest_of(state), BrokenCheckpoint))
    if path is None:
        log.info("no checkpoint in %s: starting from the beginning", folder_of(state))
        return
    ranks.together(lambda: state.engine.load(path), ValueError, OSError)
    saved = json.loads((path / "state.json").read_text())
    for name, now in (("seed", state.seed), ("batch_size", state.batch_size)):
        if saved[name] != now:
            log.warning(
                "%s was made with %s = %s and goes on with %s: not the run it would have been",
                path, name, saved[name], now,
            )  # fmt: skip
    state.step, state.images = saved["step"], saved["images"]
    state.clock.elapsed = saved["seconds"]
    state.resumed = path


def _latest_of(state: TrainState) -> Path | None:
    return latest(folder_of(state)) if ranks.leads() else None


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None if there never was one; broken ones are named aloud."""
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


def verify(path: Path) -> None:
    """Raise BrokenCheckpoint, naming the file, unless all files are as they were written."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        expected = {name: (int(m["size"]), str(m["sha256"])) for name, m in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise BrokenCheckpoint(f"{path / _MANIFEST} cannot be read: {problem!r}") from problem
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise BrokenCheckpoint(f"{file} is missing")
        if file.stat().st_size != size:
            raise BrokenCheckpoint(f"{file} has {file.stat().st_size} bytes instead of {size}")
        if _fingerprint(file)["sha256"] != digest:
            raise BrokenCheckpoint(f"{file} was changed after it was written (SHA-256 differs)")


def save_module(path: Path, module: nn.Module) -> None:
    """A module's weights as safetensors, by the leading process; OSError if they cannot be written.

    Every process must call it, since each may hold pieces of them.
    """
    tensors = gathered_state(module)
    if ranks.leads():
        save_tensors(path, tensors)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """As safetensors; OSError if they cannot be written."""
    unshared: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.contiguous()
        if value.data_ptr() in seen:  # safetensors has no shared storage
            value = value.clone()
        seen.add(value.data_ptr())
        unshared[name] = value
    try:
        save_file(unshared, path, metadata)
    except SafetensorError as problem:
        raise OSError(f"{path} cannot be written: {problem}") from problem


def load_module(path: Path, module: nn.Module) -> None:
    """Load weights that fit the module exactly; ValueError naming what differs."""
    if not path.is_file():
        there = sorted(f.name for f in path.parent.glob("*.safetensors"))
        raise ValueError(f"{path} is missing; there are: {', '.join(there) or 'no weights'}")
    try:
        tensors = load_file(path)
    except SafetensorError as problem:
        raise BrokenCheckpoint(f"{path} is no safetensors file: {problem}") from problem
    check_fit(
        path,
        {name: tuple(value.shape) for name, value in tensors.items()},
        {name: tuple(value.shape) for name, value in module.state_dict().items()},
    )
    module.load_state_dict(tensors)


def check_fit(
    path: Path, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError unless the shapes of saved weights are those of the network."""
    differences = [f"{name} is missing" for name in here.keys() - there.keys()]
    differences += [f"{name} is unknown here" for name in there.keys() - here.keys()]
    differences += [
        f"{name} has shape {there[name]}, here {shape}"
        for name, shape in here.items()
        if name in there and there[name] != shape
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:5]) + ("; ..." if len(differences) > 5 else "")
        raise ValueError(
            f"{path} does not fit this network in {len(differences)} of {len(here)} tensors: "
            f"{shown}. Use the backbone, heads and data shape that it was made with"
        )


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """An optimizer's state; OSError if it cannot be written."""
    try:
        torch.save(state, path)
    except RuntimeError as problem:  # what torch's file writer raises
        raise OSError(f"{path} cannot be written: {problem}") from problem


def copied(tensor: Tensor) -> Tensor:
    """In the memory of the host, where training does not change it."""
    return tensor.detach().to("cpu", copy=True)


def copied_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state, likewise."""
    kept = {
        number: {k: copied(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": kept}


def read_state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    """Delete a checkpoint so that no moment shows half of one."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.discarded")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)
