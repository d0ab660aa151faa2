"""What a comparison came to: its rows of finished runs, and why the other cells failed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.grids.result_table import result_table
from benchmarks.runs.frame import frame
from benchmarks.runs.result import Result
from registry.protocols import RecordStore


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a comparison's table: the runs that differ in their seeds alone."""

    arm: str
    values: Mapping[str, str]  # of the grid's axes, as gin text
    folders: tuple[Path, ...]  # of the finished runs

    @cached_property
    def results(self) -> tuple[Result, ...]:
        """Read from the folders, one for each seed."""
        return tuple(map(Result.load, self.folders))


@dataclass(frozen=True, kw_only=True)
class ComparisonOutcome:
    """The outcome of a comparison."""

    folder: Path
    rows: Mapping[str, Row]  # by name; a row without a finished run is left out
    failed: Mapping[str, str]  # why, by the name of the cell
    seconds: float
    store: RecordStore | None  # where the records are copied to

    def results(self, by: str = "") -> dict[Any, list[Result]]:
        """The results of the seeds of each row; with `by`, of each value of this axis.

        `by` is a key of the grid's axes, or the last word of one. The values have the arm before
        them where there are several arms. KeyError, with the axes that there are, for another name.
        """
        if not by:
            return {name: list(row.results) for name, row in self.rows.items()}
        keys = list(dict.fromkeys(key for row in self.rows.values() for key in row.values))
        named = [key for key in keys if by in (key, key.split("/")[-1], key.split(".")[-1])]
        if len(named) != 1:
            raise KeyError(
                f"{by!r} names {len(named) or 'none'} of the axes; they are: "
                f"{', '.join(keys) or 'none, this is no grid'}"
            )
        arms = {row.arm for row in self.rows.values()}
        found: dict[Any, list[Result]] = {}
        for row in self.rows.values():
            value = _plain(row.values.get(named[0]))
            label = (row.arm, value) if len(arms) > 1 else value
            found.setdefault(label, []).extend(row.results)
        return found

    def text(self) -> str:
        """The table as aligned Markdown; '' where no run has finished."""
        if not self.rows:
            return ""
        return result_table(frame(self.results()))


class CellsFailed(RuntimeError):
    """`failed` says by name why cells failed; `comparison` has the outcome of the others."""

    def __init__(self, failed: Mapping[str, str], comparison: Any):
        super().__init__("\n".join(f"{name} failed: {why}" for name, why in failed.items()))
        self.failed, self.comparison = failed, comparison


def _plain(text: str | None) -> Any:
    """A value of an axis as Python data; a reference, such as @dual(), stays text."""
    try:
        return ast.literal_eval(text) if text is not None else None
    except (ValueError, SyntaxError):
        return text
