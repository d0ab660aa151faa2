"""What the pages of the methods tell and no code says: outcomes of check, of runs, of bench.

One JSON file keeps them beside the pages. Each part of it is replaced by a new measurement, never
edited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.conformance.report import ConformanceReport
from benchmarks.conformance.results import ClaimResult
from benchmarks.report.reading.recorded_runs import RecordedCell, read_runs
from benchmarks.runs.result import Result
from benchmarks.speed.table import Speed

MADE = ("commit", "version.objective-zoo", "version.torch", "platform")
PASSES = "cost/passes_per_step"


@dataclass(frozen=True, kw_only=True)
class KeptCheck:
    """The outcome of `objective-zoo check` on one objective."""

    version: str
    results: Sequence[ClaimResult]


@dataclass(frozen=True, kw_only=True)
class KeptRuns:
    """The finished runs of one gin file.

    `command` runs all arms of the file in the same way. `made` says by which version and on what
    they were made; `rows` are the results by row, one for each seed; `passes` are those of a step,
    by row.
    """

    file: str
    command: str
    made: Mapping[str, str]
    rows: Mapping[str, Sequence[Result]]
    passes: Mapping[str, float]

    def of(self, objective: str) -> dict[str, Sequence[Result]]:
        """The rows of one objective."""
        return {row: found for row, found in self.rows.items() if found[0].objective == objective}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything that was measured; `compared` is by gin file, `checked` by objective."""

    checked: Mapping[str, KeptCheck] = field(default_factory=dict)
    compared: Mapping[str, KeptRuns] = field(default_factory=dict)
    speed: Speed | None = None

    def with_report(self, report: ConformanceReport) -> Measured:
        found = KeptCheck(version=version("objective-zoo"), results=report.results)
        return replace(self, checked={**self.checked, report.objective: found})

    def with_runs(self, folders: Sequence[Path]) -> Measured:
        """With the finished runs in these folders, in place of earlier ones of their gin files."""
        files: dict[str, list[RecordedCell]] = {}
        # One by one: rows of one name in several folders would be named after these.
        for cell in (cell for folder in folders for cell in read_runs([folder]).cells):
            files.setdefault(cell.command.split()[2], []).append(cell)
        new = {file: _compared(file, cells) for file, cells in files.items()}
        return replace(self, compared={**self.compared, **new})

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        )

    @classmethod
    def load(cls, path: Path) -> Measured:
        """ValueError for a file that this does not read; nothing measured if there is none."""
        if not path.exists():
            return cls()
        try:
            return _measured(json.loads(path.read_text()))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not what `python -P -m benchmarks.method_pages` wrote: {error!r}. "
                "Restore it, or remove it and measure again"
            ) from error


def _compared(file: str, cells: Sequence[RecordedCell]) -> KeptRuns:
    rows: dict[str, list[Result]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        rows.setdefault(cell.group, []).append(cell.result)
    order = dict.fromkeys(cell.group for cell in cells)
    tags = [cell.record.tags for cell in cells]
    made = {name: _joined(found.get(name, "not recorded") for found in tags) for name in MADE}
    passes = {cell.group: value for cell in cells if (value := cell.last(PASSES)) is not None}
    command = _joined(re.sub(r" --arm \S+", "", cell.command) for cell in cells)
    return KeptRuns(
        file=file, command=command, made=made, rows={row: rows[row] for row in order}, passes=passes
    )


def _joined(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))


def _measured(read: Mapping[str, Any]) -> Measured:
    checked = {
        name: KeptCheck(version=one["version"], results=[ClaimResult(**r) for r in one["results"]])
        for name, one in read["checked"].items()
    }
    compared = {
        file: KeptRuns(
            **{**one, "rows": {k: [Result(**r) for r in rows] for k, rows in one["rows"].items()}}
        )
        for file, one in read["compared"].items()
    }
    speed = None if read["speed"] is None else Speed.of(read["speed"])
    return Measured(checked=checked, compared=compared, speed=speed)
