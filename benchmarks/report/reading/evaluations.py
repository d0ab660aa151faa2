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
        newest = json.loads(path.read_text())
        found: list[dict[str, Any]] = [newest, *newest.get("others", [])]
        measured = [(one["values"], one["features"], int(one["samples"])) for one in found]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}. Run evaluate again") from error
    for one, (values, notes, samples) in zip(found, measured, strict=True):
        by_metric: dict[str, dict[int, float]] = {}
        for key, value in values.items():
            if match := re.match(r"nfe(\d+)/(.+)", key):
                by_metric.setdefault(match[2], {})[int(match[1])] = value
        for metric, by_nfe in by_metric.items():
            yield EvaluationLine(
                group=cell.group,
                seed=cell.seed,
                name="; ".join([path.parent.name, *_apart(one, found)]),
                samples=samples,
                metric=metric,
                by_nfe=by_nfe,
                real=values.get(f"{metric}_floor", values.get(f"{metric}_ceiling")),
                reference=_references(notes),
            )


def _apart(one: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What sets one evaluation of a folder apart from the others in it, beside what is shown."""
    told = []
    for name in ("seed", "labels", "bindings", "weights", "code", "operative"):
        texts = [_told(name, other.get(name)) for other in found]
        if len(set(texts)) > 1:
            told.append(f"{name} {_told(name, one.get(name))}")
    return told


def _told(name: str, value: Any) -> str:
    if name == "bindings":
        return ", ".join(map(str, value or ())) or "none"
    if name == "code":
        return str(value.get("commit", "-"))[:8] if isinstance(value, Mapping) else "-"
    return str(value).removeprefix("sha256 ")[: 40 if name == "labels" else 8]


def _references(notes: Mapping[str, Mapping[str, Any]]) -> str:
    """Every reference once, with the first 16 digits of its hash."""
    found = dict.fromkeys(str(note.get("reference", "-")) for note in notes.values())
    return re.sub(r"(sha256 \w{16})\w+", r"\1", "; ".join(found))
