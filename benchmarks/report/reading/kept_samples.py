"""The samples that the cells of a section kept (benchmarks/runs/samples.py), for one seed.

The seed is the lowest of those that most rows have. Of the checkpoints at most MAX_STEPS are read,
so that a page that shows them stays small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.report.reading.comparability import Section
from benchmarks.report.reading.recorded_runs import RecordedCell
from benchmarks.runs.result import REAL, SAMPLES

MAX_STEPS = 12

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class KeptSamples:
    """The samples of one row: {"nfe4": [n *d]} by step, the end included, and real data."""

    group: str
    seed: int
    by_step: Mapping[int, Arrays]
    real: Arrays  # what real.safetensors holds

    @property
    def final(self) -> Arrays:
        return self.by_step[max(self.by_step)]

    @property
    def nfes(self) -> list[int]:
        return sorted(int(name.removeprefix("nfe")) for name in self.final)


def kept_samples(section: Section) -> list[KeptSamples]:
    """The samples of every row that kept some which can be shown: points in the plane, pictures."""
    kept = [c for c in section.cells if (c.folder / SAMPLES).exists() and _shows(_final(c))]
    if not kept:
        return []
    counts = Counter(cell.seed for cell in kept)
    seed = min(counts, key=lambda s: (-counts[s], s))
    return [
        KeptSamples(group=cell.group, seed=seed, by_step=_by_step(cell), real=_real(cell))
        for cell in kept
        if cell.seed == seed
    ]


def _final(cell: RecordedCell) -> dict[str, Array]:
    return dict(load_file(cell.folder / SAMPLES))


def _real(cell: RecordedCell) -> dict[str, Array]:
    path = cell.folder / REAL
    return dict(load_file(path)) if path.exists() else {}


def _shows(samples: Arrays) -> bool:
    shape = next(iter(samples.values())).shape[1:]
    return shape == (2,) or (len(shape) == 3 and shape[0] in (1, 3))


def _by_step(cell: RecordedCell) -> dict[int, Arrays]:
    """The samples of some of the checkpoints and always those of the end."""
    files = {int(f.stem[5:]): f for f in sorted((cell.folder / "samples").glob("step_*"))}
    end = int(next(iter(cell.record.metrics[k] for k in cell.result.values)).steps[-1])
    files.pop(end, None)
    chosen: list[tuple[int, Path]] = list(files.items())
    if len(chosen) >= MAX_STEPS:
        places = np.linspace(0, len(chosen) - 1, MAX_STEPS - 1).round().astype(int)
        chosen = [chosen[i] for i in dict.fromkeys(places.tolist())]
    return {**{step: dict(load_file(file)) for step, file in chosen}, end: _final(cell)}
