"""Snapshots of power-function averages, stored while a run trains.

    ema_snapshots/step_00001000/
        width_0.05.safetensors   the whole average, float32
        snapshot.json            step, images, seconds; widths by file; the names of buffers
        manifest.json            size and SHA-256 of the other files

Half precision would halve the files. But a reconstruction multiplies roundings with the sum of its
coefficients' magnitudes: 1 to 5 between the stored widths, 10 to 500 below them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from backbones.pretrained.tensors import save_tensors
from registry.protocols import LossOutput
from trainers import ranks
from trainers.budget import Spent
from trainers.checkpoints.checkpoint import checkpoints
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
from trainers.ema.averages import power_name
from trainers.ema.power_function import Profile, exponent
from trainers.sharding import gathered_state
from trainers.state import Callback, TrainState

FOLDER, ABOUT = "ema_snapshots", "snapshot.json"

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Snapshot:
    """What is stored of one step: relative widths by file, and the names of buffers, as copied."""

    step: int
    images: int
    seconds: float
    widths: Mapping[str, float]
    buffers: Sequence[str]


@dataclass(kw_only=True, eq=False)
class EmaSnapshots(Callback):
    """Stores the averages of these relative widths `count` times, evenly over the budget.

    It goes before a CheckpointCallback, so that no checkpoint is ahead of the snapshots. The leader
    gathers one average at a time in its CPU's memory while training waits, off the clock. A disk
    that is full is a warning: training goes on.
    """

    widths: Sequence[float]
    count: int

    _done: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for width in self.widths:
            exponent(width)
        if self.count < 1:
            raise ValueError(f"EmaSnapshots(count={self.count!r}) must be 1 or more")

    def on_start(self, state: TrainState) -> None:
        """Snapshots of steps that are to be done again are dropped."""
        kept = ranks.from_leader(ranks.together(partial(_kept, state), OSError))
        self._done = 0 if kept is None else self._due(state, kept)

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        due = self._due(state, state)
        if due > self._done:
            self._done = due
            self._save(state)

    def on_end(self, state: TrainState) -> None:
        """A budget of seconds may come to its end after the last step was looked at."""
        if state.finished and not state.stop and self._done < self.count:
            self._done = self.count
            self._save(state)

    def _due(self, state: TrainState, spent: Spent) -> int:
        """How many snapshots there are to be by then."""
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
        """By all processes together; OSError in all of them."""
        _lead(partial(begin, aside))
        for width in self.widths:
            tensors = gathered_state(state.emas[power_name(width)])
            _lead(partial(save_tensors, aside / _file(width), tensors))
        net = state.emas[power_name(self.widths[0])]
        snapshot = Snapshot(
            step=state.step,
            images=state.images,
            seconds=state.seconds,
            widths={_file(width): width for width in self.widths},
            buffers=sorted(net.state_dict().keys() - dict(net.named_parameters()).keys()),
        )
        _lead(partial(_complete, aside, target, snapshot))


def folder_of(state: TrainState) -> Path:
    if state.folder is None:
        raise ValueError("snapshots of averages need a folder: fit(folder=...)")
    return state.folder / FOLDER


def _file(width: float) -> str:
    return f"width_{width}.safetensors"


def _kept(state: TrainState) -> Snapshot | None:
    """The last snapshot up to the state's step, once later ones are gone."""
    if not ranks.leads():
        return None
    folder = folder_of(state)
    for left in folder.glob(".step_*"):
        shutil.rmtree(left)
    found = checkpoints(folder)
    kept = [path for path in found if int(path.name.removeprefix("step_")) <= state.step]
    for path in found[len(kept) :]:
        discard(path)
    return next((snapshot for _, snapshot in _whole(reversed(kept))), None)


def _whole(folders: Iterable[Path]) -> Iterator[tuple[Path, Snapshot]]:
    """Those that are as they were written; others are named aloud."""
    for folder in folders:
        try:
            verify(folder)
        except BrokenCheckpoint as problem:
            log.warning("snapshot left out: %s", problem)
        else:
            yield folder, Snapshot(**json.loads((folder / ABOUT).read_text()))


def _lead(act: Callable[[], object]) -> None:
    """Done by the leader; its OSError is everybody's."""
    ranks.together(lambda: act() if ranks.leads() else None, OSError)


def _complete(aside: Path, target: Path, snapshot: Snapshot) -> None:
    write_json(aside / ABOUT, asdict(snapshot))
    for file in aside.iterdir():
        sync(file)
    publish(aside, target, {file.name: fingerprint(file) for file in aside.iterdir()})


@dataclass(frozen=True)
class Stored:
    """One average of a snapshot."""

    profile: Profile
    path: Path
    buffers: frozenset[str]


def stored(run: Path) -> list[Stored]:
    """The averages in a run's folder, by step; ValueError if there are none."""
    folder = run / FOLDER
    found = [
        Stored(Profile(snapshot.step, width), path / file, frozenset(snapshot.buffers))
        for path, snapshot in _whole(checkpoints(folder))
        for file, width in snapshot.widths.items()
    ]
    if not found:
        inside = sorted(path.parent.name for path in run.glob(f"*/{FOLDER}"))
        hint = f" There are some in its folders {', '.join(inside)}." if inside else ""
        raise ValueError(
            f"{folder} holds no snapshot.{hint} A run makes them by run.power_emas = (0.05, 0.1) "
            "and run.ema_snapshots = 32"
        )
    return found
