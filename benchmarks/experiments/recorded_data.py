"""The data set of a finished run as the run recorded it, so that samples need no data.

    data.json   name, shape, number of classes, size and identity; by what they were scaled; how
                often each label occurs; of codes, what decodes them

The data set itself is built when rows of it are asked for, and not before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.streams import apportion, interleave
from benchmarks.latents.codes import Codes, KnowsCodes
from registry.protocols import Coded, Cond, Dataset, scaled_by
from trainers.checkpoints.whole_files import write_json

DATA = "data.json"
_TRIED = (1, 7, 100)  # numbers of labels for which the recorded rule must give the data set's own

log = logging.getLogger(__name__)


def record_data(dataset: Dataset, folder: Path) -> None:
    """Write what samples of a run in `folder` need of its data set."""
    content: dict[str, Any] = {
        "name": dataset.name,
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes,
        "size": dataset.size,
        "identity": dataset.identity(),
        "scaled_by": scaled_by(dataset),
        "label_counts": _label_counts(dataset),
        "coded": isinstance(dataset, Coded),
        "codes": dataset.codes.to_json() if isinstance(dataset, KnowsCodes) else None,
    }
    write_json(folder / DATA, content)


def recorded_data(folder: Path, build: Callable[[], Dataset]) -> RecordedData | None:
    """The data set that the run in `folder` recorded; None where an earlier version recorded none.

    `build` makes the data set itself.
    """
    path = folder / DATA
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kind = RecordedCodes if facts["coded"] else RecordedData
        data = kind(
            name=str(facts["name"]),
            shape=tuple(map(int, facts["shape"])),
            num_classes=int(facts["num_classes"]),
            size=int(facts["size"]),
            recorded_identity=str(facts["identity"]),
            scaled_by=float(facts.get("scaled_by", 1.0)),  # earlier versions had no scale
            label_counts=facts["label_counts"] and tuple(map(int, facts["label_counts"])),
            codes=facts["codes"],
            build=build,
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{path} cannot be read, and says what the run's data are. Put it back from a copy of "
            "the folder, or remove it: then the data themselves must be there"
        ) from None
    return data


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedData:
    """A data set by what is recorded of it; `original`, built at first use, has the rows."""

    name: str
    shape: tuple[int, ...]
    num_classes: int
    size: int
    recorded_identity: str
    scaled_by: float
    label_counts: tuple[int, ...] | None  # None: the original must be asked
    codes: Mapping[str, Any] | None
    build: Callable[[], Dataset]

    def identity(self) -> str:
        return self.recorded_identity

    def sample_labels(self, n: int) -> Cond | None:
        if not self.num_classes:
            return None
        if self.label_counts is None:
            return self.original.sample_labels(n)
        return {"label": _labels(n, self.label_counts)}

    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        return self.original.batch(step, n, seed)

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        return self.original.reference(n, seed)

    @cached_property
    def original(self) -> Dataset:
        """The data set itself; a warning where it is not the one that was recorded."""
        found = self.build()
        warn_of_other_data(self.recorded_identity, found)
        return found


class RecordedCodes(RecordedData):
    """The same for codes: samples are decoded by what is recorded of them."""

    def decode(self, codes: Tensor) -> Tensor:
        """[n *shape] -> pixels [n c h w] in [-1, 1], on the device of the codes."""
        return self._decoder.decode(codes)

    @cached_property
    def _decoder(self) -> Any:
        return self.original if self.codes is None else Codes.from_json(self.codes)


def warn_of_other_data(recorded: str, dataset: Dataset) -> None:
    """A warning if the data are not those that a run recorded; '' stands for no record."""
    if recorded and recorded != (found := dataset.identity()):
        log.warning(
            "the data are not those that the run was trained on:\n  then  %s\n  now   %s",
            recorded,
            found,
        )


def _label_counts(dataset: Dataset) -> list[int] | None:
    """How often each label occurs; None where the data set chooses labels by a rule of its own."""
    if not dataset.num_classes or not dataset.size:
        return None
    cond = dataset.sample_labels(dataset.size)
    if cond is None or set(cond) != {"label"}:
        return None
    counts = tuple(torch.bincount(cond["label"], minlength=dataset.num_classes).tolist())
    for n in _TRIED:
        own = dataset.sample_labels(n)
        if own is None or not torch.equal(own["label"].cpu(), _labels(n, counts)):
            return None
    return list(counts)


def _labels(n: int, counts: tuple[int, ...]) -> Tensor:
    return interleave(apportion(n, torch.tensor(counts)))
