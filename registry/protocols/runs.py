"""What surrounds a run: how it is updated, measured, recorded, launched and pruned.

What a part may declare beside these contracts is in registry/protocols/capabilities.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from registry.protocols.batches import Batch, LossOutput


class Engine(Protocol):
    """How one TrainStep(net, objective) is run and updated: precision, accumulation, sharding.

    It is the one part that holds state, so it serves one run at a time.

    `module`      what it was prepared with
    `prepare`     takes the module over, moves it to the device and builds the optimizer
    `shares`      yields the batch once for each of this process's equal shares of it. In process k
                  of n they hold together every n-th row, from row k on; where an objective
                  declares a group, TrainStep takes groups in the place of rows
    call          runs the module on one share, through the engine's hooks; `backward` of the mean
                  loss of the share follows
    `autocast`    the precision of that call, for checks that come before `prepare`
    `step`        applies one update at `lr_factor` times the learning rate, and returns the norm of
                  the gradient before clipping
    `holds_back`  whether a gradient that is not finite leads to no update
    `update_averages`  updates EMA teachers and averages of the weights, after `step`
    `save`        copies what this process holds of all these and of the optimizer, and returns a
                  function that writes the files into the folder, in any thread, and lists them
    `load`        reads them from the folder, and executes no code that is in the files
    """

    module: Any

    def prepare(
        self, module: Any, optimizer: Optimizer, device: torch.device, batch_size: int
    ) -> None: ...
    def shares(self, batch: Batch) -> Iterator[Batch]: ...
    def __call__(self, batch: Batch, rng: torch.Generator) -> LossOutput: ...
    def autocast(self, device: torch.device) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr_factor: float) -> Tensor: ...
    def holds_back(self, device: torch.device) -> bool: ...
    def update_averages(self, step: int) -> None: ...
    def save(self, folder: Path) -> Callable[[], Sequence[Path]]: ...
    def load(self, folder: Path) -> None: ...


class Optimizer(Protocol):
    """The settings of a torch optimizer, which `build` makes; a schedule multiplies `lr`."""

    @property
    def lr(self) -> float: ...
    def build(self, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer: ...


class Schedule(Protocol):
    """(step from 0, part of the budget that is spent) -> factor on the learning rate."""

    def __call__(self, step: int, progress: float) -> float: ...


class Metric(Protocol):
    """(samples, reference) -> (name, value) pairs; both are [n *d] in the data's own range.

    `better`, "lower" or "higher", may declare which of its values are better (capabilities.py).
    """

    def __call__(self, samples: Tensor, reference: Tensor) -> Iterator[tuple[str, float]]: ...


class Extractor(Protocol):
    """Images [n c h w], uint8 or in [-1, 1] -> float32 features [n d] on the CPU.

    `label` names the values. `canonical` gives the names that the literature keeps for values of
    these features, such as {"fd": "fid"}. `provenance` says what a value depends on beside the
    images.
    """

    canonical: ClassVar[dict[str, str]]

    @property
    def label(self) -> str: ...
    def __call__(self, images: Tensor) -> Tensor: ...
    def provenance(self) -> dict[str, str]: ...


class Recorder(Protocol):
    """Where the records of runs go. `start` opens a record, or continues the one in the folder.

    `parent` is the folder of the run that this one belongs to.
    """

    def start(
        self,
        name: str,
        folder: Path,
        parent: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> RunRecord: ...


class RunRecord(Protocol):
    """The record of one run. Values are plain Python; nothing is lost if a server is down.

    `text` writes a file into the run's folder, and `artifact` records a file that is there. `child`
    starts the record of a run that belongs to this one. `close` takes "FINISHED", "FAILED" or
    "KILLED". The end of the `with` block closes the record with the status that fits.
    """

    id: str
    name: str

    def params(self, values: Mapping[str, object]) -> None: ...
    def tags(self, values: Mapping[str, object]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def text(self, content: str, name: str) -> None: ...
    def artifact(self, path: Path | str) -> None: ...
    def child(
        self, name: str, folder: Path, tags: Mapping[str, str] | None = None
    ) -> RunRecord: ...
    def close(self, status: str = "FINISHED") -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: Any) -> None: ...


class RecordStore(Protocol):
    """Where a recorder copies records to, beside the folders of the runs, for others to read.

    `name` is its address as it may be printed, without a password. `open_hint` says how a person
    opens it. `finished` gives the finished cells among those with these ids, by id.
    """

    @property
    def name(self) -> str: ...
    def open_hint(self) -> str: ...
    def finished(self, ids: Iterable[str]) -> Mapping[str, StoredRun]: ...


@dataclass(frozen=True)
class StoredRun:
    """A finished run as a store knows it: what the store calls it, and its tags."""

    name: str
    tags: Mapping[str, str] = field(default_factory=dict)


class Launcher(Protocol):
    """Runs each job by `run_cell`, a function of a module, and yields how it ended, as it ends.

    After SIGINT or SIGTERM it starts no more jobs, yields those that ran, most of them as "stopped"
    with a checkpoint saved, and raises KeyboardInterrupt. A second signal acts at once.
    """

    def __call__(self, jobs: Sequence[Job], run_cell: RunCell) -> Iterator[Ended]: ...


@dataclass(frozen=True)
class Job:
    """One cell to run: its name, and the folder that the grid prepared for it."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Ended:
    """How one cell ended; `reason` is empty for a finished one."""

    name: str
    status: Literal["finished", "failed", "stopped", "pruned"]
    reason: str = ""


RunCell = Callable[[Path], Ended]
"""Runs the cell that was prepared in a folder."""


class Pruner(Protocol):
    """Whether a cell of a grid is to stop early.

    It is given the values of all cells that compete, in the order of time. The last value is that
    of the cell in question. `metric` is what it compares, and nothing stops before `min_steps`.
    """

    metric: str
    min_steps: int

    def __call__(self, values: Sequence[IntermediateValue]) -> bool: ...


@dataclass(frozen=True, order=True)
class IntermediateValue:
    """The value of a pruner's metric that one periodic evaluation of a cell found."""

    time: int  # ms since 1970
    cell: str
    step: int
    value: float
