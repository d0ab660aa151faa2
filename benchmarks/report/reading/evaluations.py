"""What `objective-zoo evaluate` left in the folders of the runs, beside their own figures.

There is one line for each evaluation and metric. Its number of samples, reference and weights may
be others than those of the run's own figures, so the lines have a table of their own, in which
there are no intervals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.reading.recorded_runs import RecordedCell

FILES = "evaluation*/evaluation.json"  # RUN/evaluation, RUN/evaluation_WEIGHTS


@dataclass(frozen=True, kw_only=True)
class EvaluationLine:
    """One metric of one evaluation; `real` is what real halves score against each other."""

    group: str
    seed: int
    name: str  # of the evaluation's folder
    samples: int
    metric: str
    by_nfe: Mapping[int, float]
    real: float | None
    reference: str


def evaluation_lines(cells: Sequence[RecordedCell]) -> list[EvaluationLine]:
    """All evaluations in the cells' folders; ValueError that names a file that cannot be read."""
    return [line for cell in cells for path in _files(cell) for line in _lines(cell, path)]


def nfes(lines: Sequence[EvaluationLine]) -> list[int]:
    return sorted({nfe for line in lines for nfe in line.by_nfe})


def _files(cell: RecordedCell) -> list[Path]:
    return sorted(cell.folder.glob(FILES))


def _lines(cell: RecordedCell, path: Path) -> Iterator[EvaluationLine]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        values, notes, samples = found["values"], found["features"], int(found["samples"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}. Run evaluate again") from error
    by_metric: dict[str, dict[int, float]] = {}
    for key, value in values.items():
        if match := re.match(r"nfe(\d+)/(.+)", key):
            by_metric.setdefault(match[2], {})[int(match[1])] = value
    for metric, by_nfe in by_metric.items():
        yield EvaluationLine(
            group=cell.group,
            seed=cell.seed,
            name=path.parent.name,
            samples=samples,
            metric=metric,
            by_nfe=by_nfe,
            real=values.get(f"{metric}_floor", values.get(f"{metric}_ceiling")),
            reference=_references(notes),
        )


def _references(notes: Mapping[str, Mapping[str, Any]]) -> str:
    """Every reference once, with the first 16 digits of its hash."""
    found = dict.fromkeys(str(note.get("reference", "-")) for note in notes.values())
    return re.sub(r"(sha256 \w{16})\w+", r"\1", "; ".join(found))
