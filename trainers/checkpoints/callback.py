"""When checkpoints are made: at intervals, at the end, and when the run is asked to end."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from registry.protocols import LossOutput
from trainers import ranks
from trainers.checkpoints import checkpoint
from trainers.checkpoints.locks import alone
from trainers.checkpoints.whole_files import sync
from trainers.checkpoints.whole_folders import remove_leftovers
from trainers.finite import NonFiniteLoss
from trainers.sharding import weight_pieces
from trainers.state import Callback, TrainState

LOCK = "training.lock"

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class CheckpointCallback(Callback):
    """Decides when a checkpoint is made, and waits until its files are written.

    One is made every `every` steps and every `every_seconds` (0 is off), at the end, and after
    SIGTERM or SIGINT. Its files are written while training goes on; the next checkpoint, and the
    end of the run, wait for them. A first signal ends the run after the current step, with a
    checkpoint and without an error; a second one acts at once. If the disk fails, a warning is
    given and training goes on. What was written to the files `along` is on the disk before a
    checkpoint is in its place, so that a power cut leaves them no shorter than the checkpoint.
    """

    every: int = 0
    every_seconds: float = 600.0
    keep: int = 2
    along: tuple[Path, ...] = ()

    _last: tuple[int, float] = field(default=(-1, 0.0), init=False, repr=False)
    _pending: checkpoint.PendingCheckpoint | None = field(default=None, init=False, repr=False)
    _lock: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _handlers: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"CheckpointCallback(keep={self.keep!r}) must be 1 or more")

    def on_start(self, state: TrainState) -> None:
        """ValueError if the folder has checkpoints of another run, or another process uses it."""
        ranks.together(partial(self._take, state), ValueError)
        present = checkpoint.checkpoints(checkpoint.folder_of(state))
        if present and not state.resumed:
            self._lock.close()
            raise ValueError(
                f"{state.folder} holds checkpoints of an earlier run (newest: {present[-1].name}). "
                "Resume it, or choose another folder"
            )
        self._last = (state.step if state.resumed else -1, time.monotonic())
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._stopper(state))

    def on_step(self, state: TrainState, out: LossOutput) -> None:
        due = bool(self.every) and state.step % self.every == 0
        late = 0 < self.every_seconds <= time.monotonic() - self._last[1]
        writing = self._pending is not None and not self._pending.written
        wanted, writing = map(bool, ranks.largest(due or late, writing))
        if wanted or not writing:
            self._finish(state)
        if wanted:
            self._save(state)

    def on_end(self, state: TrainState) -> None:
        try:
            if state.finished or ranks.count() == 1:
                self._finish(state)
            if state.finished and self._last[0] != state.step:
                self._save(state)
                self._finish(state)
        finally:
            if self._pending is not None:
                self._pending.drop()
            self._restore_handlers()
            self._lock.close()

    def _take(self, state: TrainState) -> None:
        """Lock the folder, and delete what a killed process has left there."""
        folder = checkpoint.folder_of(state)
        if ranks.leads():
            self._lock.enter_context(alone(folder.parent / LOCK, "a training"))
            remove_leftovers(folder)

    def _save(self, state: TrainState) -> None:
        with state.paused():
            own = [piece.view for piece in weight_pieces(state.net) if len(piece.view)]
            largest = torch.nn.utils.get_total_norm(own, torch.inf)
            if any(ranks.largest(not largest.isfinite())):
                raise NonFiniteLoss(f"step {state.step}: the weights are not finite; not saved")
            try:
                self._pending = checkpoint.PendingCheckpoint(state)
            except OSError as problem:
                _warn(state.step, problem)
            self._last = (state.step, time.monotonic())

    def _finish(self, state: TrainState) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with state.paused():
            self._sync_along()
            try:
                pending.finish(self.keep)
            except OSError as problem:
                _warn(pending.step, problem)

    def _sync_along(self) -> None:
        for path in self.along if ranks.leads() else ():
            try:
                if path.exists():
                    sync(path)
            except OSError as problem:
                log.warning("%s may not be on the disk yet: %s", path, problem.strerror)

    def _stopper(self, state: TrainState) -> Callable[[int, FrameType | None], None]:
        def stop(number: int, frame: FrameType | None) -> None:
            state.stop_request = signal.Signals(number).name
            log.warning("%s: the run ends after this step, with a checkpoint", state.stop_request)
            self._restore_handlers()

        return stop

    def _restore_handlers(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


def _warn(step: int, problem: OSError) -> None:
    log.warning(
        "NO CHECKPOINT at step %d: %s. Training goes on; older checkpoints are intact",
        step,
        problem,
    )
