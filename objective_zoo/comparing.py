"""Comparisons started from Python: by a gin file, or by parts as objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import registry
from benchmarks.grids import comparison as library
from benchmarks.grids.outcome import CellsFailed, ComparisonOutcome
from benchmarks.grids.request import Request
from benchmarks.grids.result_table import wide
from benchmarks.runs.frame import frame
from objective_zoo.calls import isolated_call, listed
from objective_zoo.runs import Run
from registry.configuration.gin_text import bindings_of_values
from registry.core import Registry
from registry.plugins import load_plugins

if TYPE_CHECKING:
    import pandas as pd

KINDS: Mapping[str, Registry] = {  # of the arguments of `run` that are parts
    "objective": registry.objectives,
    "backbone": registry.backbones,
    "dataset": registry.datasets,
    "parametrisation": registry.parametrisations,
    "sampler": registry.samplers,
    "engine": registry.engines,
    "optimizer": registry.optimizers,
    "teacher_optimizer": registry.optimizers,
    "schedule": registry.schedules,
    "metric": registry.metrics,
    "recorder": registry.recorders,
    "pruner": registry.pruners,
}


class Comparison:
    """The outcome of a comparison: its table, the runs that have finished, why others failed."""

    def __init__(self, found: ComparisonOutcome):
        self._found = found
        self.folder = found.folder

    def __repr__(self) -> str:
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"Comparison({str(self.folder)!r}): {len(self.runs)} runs{failed}"

    @property
    def runs(self) -> dict[str, Run]:
        """The finished runs, by the names of their folders."""
        rows = self._found.rows.values()
        return {folder.name: Run(folder) for row in rows for folder in row.folders}

    @property
    def failed(self) -> dict[str, str]:
        """Why each cell failed that did, by its name."""
        return dict(self._found.failed)

    def table(self, by: str = "") -> pd.DataFrame:
        """Means over seeds: one line for each row, the columns are pairs (metric, NFE).

        ("fid", 4) is the metric at 4 NFE and ("fid", "real") what real data score; ("seeds", "") is
        the number of runs, and ("cost", "seconds_per_step") and others are what a run cost. `by`
        names one of the grid's axes, such as "n2n_every": lines are then its values (with the arm
        before them where there are several), and means go over everything else. KeyError, with the
        axes that there are, for another name.
        """
        import pandas as pd

        found = self._found.results(by)
        table = wide(frame({str(number): runs for number, runs in enumerate(found.values())}))
        labels = list(found)
        if labels and isinstance(labels[0], tuple):
            table.index = pd.MultiIndex.from_tuples(labels, names=["arm", by])
        else:
            table.index = pd.Index(labels, name=by or "row")
        return table


class PlannedRun:
    """One run without a gin file, not yet run; `config` is the gin text that says the same."""

    def __init__(self, bindings: Sequence[str]):
        self._bindings = tuple(bindings)

    def __repr__(self) -> str:
        return f"PlannedRun:\n{self.config}"

    @property
    def config(self) -> str:
        """One binding a line."""
        return "\n".join(self._bindings)

    def run(
        self,
        out: str | Path,
        *,
        resume: bool = False,
        fork: str | Path | None = None,
        rehearsal: bool = True,
        progress: bool = False,
    ) -> Run:
        """Train, sample, measure and record it in `out`, a new folder.

        With `resume` what is in it goes on; with `fork` it starts from the run in that folder.
        """
        request = Request(file=None, bindings=self._bindings)
        how: dict[str, Any] = {"resume": resume, "fork": _path(fork), "rehearsal": rehearsal}
        with isolated_call(progress):
            found = _finished(lambda: library.compare(request, Path(out), **how))
        return next(iter(found.runs.values()))


def compare(
    file: str | Path,
    arms: Sequence[str],
    values: Mapping[str, Any],
    out: Path,
    *,
    resume: bool,
    fork: str | Path | None,
    rehearsal: bool,
    progress: bool,
) -> Comparison:
    """See `objective_zoo.run`."""
    with isolated_call(progress):
        request = _request(file, arms, values)
        how: dict[str, Any] = {"resume": resume, "fork": _path(fork), "rehearsal": rehearsal}
        return _finished(lambda: library.compare(request, out, **how))


def grid(
    file: str | Path,
    arms: Sequence[str],
    values: Mapping[str, Any],
    out: Path,
    *,
    workers: int | None,
    retry_failed: bool,
    rehearsal: bool,
    progress: bool,
) -> Comparison:
    """See `objective_zoo.grid`."""
    with isolated_call(progress):
        request = _request(file, arms, values)
        return _finished(
            lambda: library.run_grid(
                request, out, workers=workers, retry_failed=retry_failed, rehearsal=rehearsal
            )
        )


def experiment(arguments: Mapping[str, Any], values: Mapping[str, Any]) -> PlannedRun:
    """See `objective_zoo.experiment`."""
    load_plugins()
    given = {f"run.{name}": _part(name, value) for name, value in arguments.items()}
    if twice := sorted(given.keys() & {*values}):
        raise ValueError(f"set has {', '.join(twice)}, which an argument gives too; keep one")
    return PlannedRun(bindings_of_values(given | dict(values)))


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _request(file: str | Path, arms: Sequence[str], values: Mapping[str, Any]) -> Request:
    load_plugins()
    only = listed("arms", arms)
    if unnamed := [arm for arm in only if not isinstance(arm, str)]:
        raise ValueError(f"arms = {arms!r} must be names, and {unnamed[0]!r} is none")
    bindings = tuple(bindings_of_values(values, beside_file=True))
    return Request(file=Path(file), bindings=bindings, only=only)


def _part(name: str, value: Any) -> Any:
    """A part that is given by its name, as a reference; others as they are.

    ValueError for a class where an instance belongs: gin would not build it.
    """
    kind = KINDS.get(name)
    if kind and name != "backbone" and isinstance(value, type):
        raise ValueError(
            f"{name} = {value.__name__} is a class; make it a part with brackets: "
            f"{value.__name__}()"
        )
    if kind is None or not isinstance(value, str) or value.startswith("@"):
        return value
    kind.get(value)  # says which there are
    return f"@{value}" if name == "backbone" else f"@{value}()"


def _finished(work: Callable[[], ComparisonOutcome]) -> Comparison:
    try:
        return Comparison(work())
    except CellsFailed as failure:
        raise CellsFailed(failure.failed, Comparison(failure.comparison)) from None
