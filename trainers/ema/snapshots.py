"""Snapshots of power-function averages, which are stored while a run trains.

    ema_snapshots/step_00001000/
        width_0.05.safetensors   the whole average, float32
        snapshot.json            step, images, seconds; widths by file; the names of buffers
        manifest.json            size and SHA-256 of the other files

On disk sigma_rel is called "width", as in version 0.1: a run may be continued by a later version,
and its folder then has snapshots of both.

Half precision would halve the files. But a reconstruction multiplies rounding errors by the sum of
the magnitudes of its coefficients. That sum is 1 to 5 for a sigma_rel between the stored ones, and
10 to 500 below them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from backbones.pretrained.tensors import save_tensors
from registry.folders import file_in
from registry.protocols import LossOutput
from trainers import ranks
from trainers.budget import Counters
from trainers.checkpoints.checkpoint import checkpoints
from trainers.checkpoints.whole_files import read_json, sync, write_json
from trainers.checkpoints.whole_folders import (
    aside_of,
    begin,
    discard,
    fingerprint,
    publish,
    remove_leftovers,
    verify,
)
from trainers.ema.averages import power_name
from trainers.ema.power_function import Profile, exponent
from trainers.sharding import gathered_state
from trainers.state import Callback, TrainState

FOLDER, ABOUT = "ema_snapshots", "snapshot.json"

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Snapshot:
    """The content of snapshot.json, field by field.

    `widths` is sigma_rel by file. `buffers` are the tensors that are copied, not averaged.
    """

    step: int
    images: int
    seconds: float
    widths: Mapping[str, float]
    buffers: Sequence[str]


@dataclass(kw_only=True, eq=False)
class EmaSnapshots(Callback):
    """Stores the averages of these relative widths `count` times, evenly over the budget.

    It must come before a CheckpointCallback, so that no checkpoint is ahead of the snapshots. The
    leader gathers one average at a time in the memory of its CPU; training waits, and the clock
    stops meanwhile. If the disk is full, a warning is given and training goes on.
    """

    sigma_rels: Sequence[float]
    count: int

    _done: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for sigma_rel in self.sigma_rels:
            exponent(sigma_rel)
        if self.count < 1:
            raise ValueError(f"EmaSnapshots(count={self.count!r}) must be 1 or more")

    def on_start(self, state: TrainState) -> None:
        """Delete the snapshots of steps that will be done again."""
        kept = ranks.from_leader(ranks.together(partial(_kept, state), OSError))
        self._done = 0 if kept is None else self._due(state, kept)

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        due = self._due(state, state)
        if due > self._done:
            self._done = due
            self._save(state)

    def on_end(self, state: TrainState) -> None:
        """Store the last snapshot if a budget of seconds ended after `on_step` had checked it."""
        if state.finished and not state.stop and self._done < self.count:
            self._done = self.count
            self._save(state)

    def _due(self, state: TrainState, spent: Counters) -> int:
        """How many snapshots there must be when this much of the budget is spent."""
        budget = state.budget
        return int(budget.spent(spent) * self.count // budget.amount)

    def _save(self, state: TrainState) -> None:
        target = folder_of(state) / f"step_{state.step:08d}"
        aside = aside_of(target)
        with state.paused():
            try:
                self._write(state, aside, target)
            except OSError as problem:
                log.warning(
                    "NO SNAPSHOT of the averages at step %d: %s. Training goes on, and "
                    "reconstructions have one snapshot less",
                    state.step,
                    problem,
                )
                if ranks.leads():
                    shutil.rmtree(aside, ignore_errors=True)

    def _write(self, state: TrainState, aside: Path, target: Path) -> None:
        """Every process must call it; if writing fails, all of them raise OSError."""
        _lead(partial(begin, aside))
        for sigma_rel in self.sigma_rels:
            tensors = gathered_state(state.emas[power_name(sigma_rel)])
            _lead(partial(save_tensors, aside / _file(sigma_rel), tensors))
        net = state.emas[power_name(self.sigma_rels[0])]
        snapshot = Snapshot(
            step=state.step,
            images=state.images,
            seconds=state.seconds,
            widths={_file(sigma_rel): sigma_rel for sigma_rel in self.sigma_rels},
            buffers=sorted(net.state_dict().keys() - dict(net.named_parameters()).keys()),
        )
        _lead(partial(_complete, aside, target, snapshot))


def folder_of(state: TrainState) -> Path:
    if state.folder is None:
        raise ValueError("snapshots of averages need a folder: fit(folder=...)")
    return state.folder / FOLDER


def _file(sigma_rel: float) -> str:
    return f"width_{sigma_rel}.safetensors"


def _kept(state: TrainState) -> Snapshot | None:
    """Delete the snapshots after the state's step; returns the last one that is left and whole."""
    if not ranks.leads():
        return None
    folder = folder_of(state)
    remove_leftovers(folder)
    found = checkpoints(folder)
    kept = [path for path in found if int(path.name.removeprefix("step_")) <= state.step]
    for path in found[len(kept) :]:
        discard(path)
    return next((snapshot for _, snapshot in _whole(reversed(kept))), None)


def _whole(folders: Iterable[Path]) -> Iterator[tuple[Path, Snapshot]]:
    """The folders that are as they were written; a warning names each of the others."""
    for folder in folders:
        try:
            verify(folder)
            snapshot = Snapshot(**read_json(folder / ABOUT))
        except TypeError:
            log.warning("snapshot left out: %s describes no snapshot", folder / ABOUT)
        except ValueError as problem:
            log.warning("snapshot left out: %s", problem)
        else:
            yield folder, snapshot


def _lead(act: Callable[[], object]) -> None:
    """Let the leading process act; if it raises OSError, every process does."""
    ranks.together(lambda: act() if ranks.leads() else None, OSError)


def _complete(aside: Path, target: Path, snapshot: Snapshot) -> None:
    write_json(aside / ABOUT, asdict(snapshot))
    for file in aside.iterdir():
        sync(file)
    publish(aside, target, {file.name: fingerprint(file) for file in aside.iterdir()})


@dataclass(frozen=True)
class Stored:
    """One average of a snapshot: its file, and the tensors in it that are buffers."""

    profile: Profile
    path: Path
    buffers: frozenset[str]


def stored(run: Path) -> list[Stored]:
    """The averages in a run's folder, in the order of steps; ValueError if there are none."""
    folder = run / FOLDER
    found = [
        Stored(Profile(snapshot.step, sigma_rel), file_in(path, file), frozenset(snapshot.buffers))
        for path, snapshot in _whole(checkpoints(folder))
        for file, sigma_rel in snapshot.widths.items()
    ]
    if not found:
        inside = sorted(path.parent.name for path in run.glob(f"*/{FOLDER}"))
        hint = f" These folders inside {run} have some: {', '.join(inside)}." if inside else ""
        raise ValueError(
            f"{folder} holds no snapshot.{hint} A run stores them if it binds, say, "
            "run.power_emas = (0.05, 0.1) and run.ema_snapshots = 32"
        )
    return found
