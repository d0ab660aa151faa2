"""From a gin file to finished runs side by side: plan the cells, build them all, run, compare.

A file with `Grid.arms` is a comparison: one run per arm, all on the same data order, noise and
initialisation. A file (or --set) that binds run.objective outside every arm is a single run, and
`--arm` picks one arm. Every cell is built before the first one trains.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin
from safetensors.torch import load_file

from benchmarks.distilling import load_teacher
from benchmarks.experiment import Experiment, run
from benchmarks.mlflow_store import open_hint
from benchmarks.results import RESULT, SAMPLES, Result
from benchmarks.runner import Texts, execute, picture
from benchmarks.table import result_table
from benchmarks.training import Stopped
from registry import gin_setup
from registry.core import did_you_mean
from registry.gin_errors import said

NUM_COLUMNS = 20  # samples per line of the picture

log = logging.getLogger(__name__)


@gin.register("Grid")
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which arms (gin scopes) a file compares.

    The gin text that a run keeps also says which arm it `only` is, and the `folders` of what it
    imports.
    """

    arms: tuple[str, ...] = ()
    only: str | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for: a gin file, more bindings, and perhaps one of its arms."""

    file: Path
    bindings: tuple[str, ...] = ()
    arm: str = ""

    def parse(self) -> tuple[Path, ...]:
        return gin_setup.parse([self.file], self.bindings)

    def arms(self) -> tuple[str, ...]:
        """The arms to run; ('',) is one run outside every arm."""
        self.parse()
        declared = _declared_arms()
        if self.arm:
            return (self.arm,)
        if (only := gin_setup.query("Grid.only")) is not None:
            return (only,)
        if not declared or gin_setup.query("run.objective") is not None:
            return ("",)
        return declared

    def own_keys(self, arms: Sequence[str]) -> set[str]:
        """The keys bound on the command line or by the file itself, not by an include.

        Where only some of the file's arms run, its plain bindings may serve the others. The text
        that a run keeps has those of its includes. A part put in on the command line may replace
        one that the file puts in, and leave its bindings.
        """
        asked = gin_setup.bindings_of("\n".join(self.bindings))
        own = gin_setup.bindings_of(gin_setup.resolve(self.file).read_text())
        keys = set(own)
        if any("@" in value for value in asked.values()):
            parts = set(re.findall(r"@(?:\w+/)*(\w+)", " ".join(own.values())))
            keys = {key for key in keys if key.split("/")[-1].split(".")[0] not in parts}
        if "Grid.folders" in keys:
            keys = set()
        elif self.arm or (tuple(arms) == ("",) and "Grid.arms" in keys):
            keys = {key for key in keys if self.arm and key.startswith(f"{self.arm}/")}
        return keys | set(asked)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run that is built and ready."""

    name: str
    experiment: Experiment
    texts: Texts


def build(request: Request) -> list[Cell]:
    """Every cell, built and checked; ValueError with the troubles of all cells together."""
    cells: list[Cell] = []
    inert: list[set[str]] = []
    troubles: list[str] = []
    cause = None
    arms = request.arms()
    for arm in arms:
        try:
            cell, unused = build_cell(request, arm)
            cells.append(cell)
            inert.append(unused)
        except Exception as error:
            troubles.append(f"{arm}: {said(error)}" if arm else said(error))
            cause = cause or error
    if not troubles and (useless := sorted(request.own_keys(arms).intersection(*inert))):
        troubles.append(
            f"nothing uses {', '.join(useless)}. A part takes its bindings only where it is bound "
            "by reference, such as mean_flow.weight = @adaptive(); what an arm binds for itself is "
            "changed under its name, such as mean_flow/run.objective = @dumo()"
        )
    if troubles:
        raise ValueError("\n".join(dict.fromkeys(troubles))) from cause
    return cells


def build_cell(request: Request, arm: str) -> tuple[Cell, set[str]]:
    """The run of one arm, and the keys that it does not use."""
    opened = request.parse()
    with gin_setup.arm(arm):
        experiment = run()
    load_teacher(experiment)
    asked = set(gin_setup.bindings_of("\n".join(request.bindings)))
    unused = {*gin_setup.inert_bindings(arm), *(asked & {*gin_setup.overridden_bindings(arm)})}
    operative = gin_setup.operative_text()
    prefix = f"{arm}/" if arm else ""
    params = {
        key.removeprefix(prefix): value for key, value in gin_setup.bindings_of(operative).items()
    }
    config = _config_text(request, opened, arm)
    texts = Texts(config=config, operative=operative, params=params)
    return Cell(name=arm or experiment.objective_name, experiment=experiment, texts=texts), unused


def _config_text(request: Request, opened: Sequence[Path], arm: str | None) -> str:
    """All that was read, as one gin file that runs the same again; arm None is all arms."""
    gin.bind_parameter("Grid.folders", gin_setup.import_folders(opened))
    words = ["objective-zoo", "run", str(request.file)]
    if arm is not None:
        gin.bind_parameter("Grid.only", arm)
        words += ["--arm", arm] if arm else []
    words += [word for binding in request.bindings for word in ("--set", binding)]
    made = shlex.join(words).replace("\n", "\n#   ")
    again = "# The same again: objective-zoo run THIS_FILE"
    return f"# Made by: {made}\n{again}\n\n{gin_setup.full_text()}\n"


def _declared_arms() -> tuple[str, ...]:
    """Grid.arms, checked: each a scope with bindings of its own."""
    arms = gin_setup.query("Grid.arms", ())
    if isinstance(arms, str) or not all(isinstance(arm, str) and arm for arm in arms):
        raise ValueError(f"Grid.arms = {arms!r} must be a tuple of names, such as ('dumo', 'decm')")
    if twice := sorted({arm for arm in arms if list(arms).count(arm) > 1}):
        raise ValueError(f"Grid.arms names {', '.join(twice)} more than once; a run has one name")
    scopes = gin_setup.scopes()
    for arm in arms:
        if arm not in scopes:
            raise ValueError(
                f"Grid.arms names {arm!r}, and nothing is bound under it."
                f"{did_you_mean(arm, scopes - set(arms))} "
                f"Add a line such as {arm}/run.objective = @{arm}()"
            )
    return tuple(arms)


def compare(request: Request, out: Path, *, resume: bool = False) -> list[Result]:
    """Run every cell in its folder under `out`, print the table; the results of those that ended.

    Cells that are finished already are not run again. A cell that fails is recorded and named, the
    others run; SystemExit(1) at the end.
    """
    _check_folder(out, resume)
    cells = build(request)
    for cell in cells:
        _check_finished(cell, out / cell.name)
    recorder = cells[0].experiment.recorder
    started, failed = time.monotonic(), {}
    with recorder.start(name=out.name, folder=out) as parent:
        parent.text(_config_text(request, request.parse(), None), "config.gin")
        for number, cell in enumerate(cells, 1):
            print(f"[{number}/{len(cells)}] {_headline(cell)}", file=sys.stderr, flush=True)
            if (out / cell.name / RESULT).exists():
                print("  finished already", file=sys.stderr)
                continue
            try:
                with parent.child(cell.name, out / cell.name) as record:
                    execute(cell.experiment, cell.texts, record, out / cell.name, resume=resume)
            except Stopped as stopped:
                raise SystemExit(f"{cell.name}: {stopped}") from None
            except Exception as error:
                log.exception("the run %s failed; the others go on", cell.name)
                failed[cell.name] = error
        results = _report(parent, cells, out)
        parent.close("FAILED" if failed else "FINISHED")
    _say_where(recorder, out, time.monotonic() - started)
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {said(e)}" for name, e in failed.items()))
    return results


def _headline(cell: Cell) -> str:
    budget, experiment = cell.experiment.budget, cell.experiment
    return (
        f"{cell.name}: {experiment.objective_name} on {experiment.dataset.name} with "
        f"{experiment.backbone_name} ({experiment.num_params:,} parameters), "
        f"{budget.amount:g} {budget.unit} at batch {experiment.batch_size}"
    )


def _report(parent: Any, cells: Sequence[Cell], out: Path) -> list[Result]:
    """The table on the terminal and as table.md, and the picture of all runs."""
    folders = {cell.name: out / cell.name for cell in cells}
    done = {name: folder for name, folder in folders.items() if (folder / RESULT).exists()}
    results = [Result.load(folder) for folder in done.values()]
    if results:
        text = result_table(results)
        print(f"\n{text}")
        parent.text(text, "table.md")
        rows = {
            f"{name} {key.removeprefix('nfe')}": samples[:NUM_COLUMNS]
            for name, folder in done.items()
            for key, samples in sorted(load_file(folder / SAMPLES).items(), key=_by_nfe)
        }
        if path := picture(rows, out / "samples.png"):
            parent.artifact(path)
    return results


def _by_nfe(item: tuple[str, Any]) -> int:
    return int(item[0].removeprefix("nfe"))


def _say_where(recorder: Any, out: Path, seconds: float) -> None:
    print(f"\n{seconds / 60:.1f} minutes")
    print(f"table     {out / 'table.md'}")
    if (out / "samples.png").exists():
        print(f"samples   {out / 'samples.png'}")
    print(f"gin text  {out}/*/config.gin, operative.gin")
    if uri := getattr(getattr(recorder, "store", None), "name", ""):
        print(f"MLflow    {uri}; open it with\n          {open_hint(uri)}")


def _check_finished(cell: Cell, folder: Path) -> None:
    """A finished run is kept: refuse to put it beside runs of other settings."""
    if not (folder / RESULT).exists():
        return
    ours, theirs = (
        {
            k.removeprefix(f"{cell.name}/"): v
            for k, v in gin_setup.bindings_of(text).items()
            if not k.startswith("mlflow.")
        }
        for text in (cell.texts.operative, (folder / "operative.gin").read_text())
    )
    if differing := sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k)):
        shown = [f"{k} = {theirs.get(k, 'unset')}, now {ours.get(k, 'unset')}" for k in differing]
        raise ValueError(
            f"{folder} is finished with other settings: {'; '.join(shown[:5])}. "
            "Remove it to run it again, or choose another --out"
        )


def _check_folder(out: Path, resume: bool) -> None:
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: continue it with --resume, or choose another --out")
