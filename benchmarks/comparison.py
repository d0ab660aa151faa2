"""From a gin file to finished runs side by side: plan the cells, build them all, run, compare.

A file with `Grid.arms` is a comparison: one run per arm, all on the same data order, noise and
initialisation. A file (or --set) that binds run.objective outside every arm is a single run, and
`--arm` picks one arm. Every cell is built before the first one trains.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gin
from safetensors.torch import load_file

from benchmarks.experiment import Experiment, run
from benchmarks.mlflow_store import open_hint
from benchmarks.runner import RESULT, SAMPLES, Result, Stopped, Texts, execute, picture
from benchmarks.table import result_table
from registry import gin_setup

NUM_COLUMNS = 20  # samples per line of the picture

log = logging.getLogger(__name__)


@gin.register("Grid")
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which arms (gin scopes) a file compares."""

    arms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for: a gin file, more bindings, and perhaps one of its arms."""

    file: Path
    bindings: tuple[str, ...] = ()
    arm: str = ""

    def parse(self) -> None:
        gin_setup.parse([self.file], self.bindings)

    def arms(self) -> tuple[str, ...]:
        """The arms to run; ('',) is one run outside every arm."""
        self.parse()
        if self.arm:
            return (self.arm,)
        declared = tuple(gin_setup.query("Grid.arms", ()))
        if not declared or gin_setup.query("run.objective") is not None:
            return ("",)
        return declared

    def own_keys(self) -> set[str]:
        """The keys bound by the file itself or on the command line, not by an include."""
        text = gin_setup.resolve(self.file).read_text()
        return set(gin_setup.bindings_of("\n".join([text, *self.bindings])))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run that is built and ready."""

    name: str
    experiment: Experiment
    texts: Texts


def build(request: Request) -> list[Cell]:
    """Every cell, built and checked; ValueError with the troubles of all cells together."""
    cells, troubles, inert = [], [], []
    arms = request.arms()
    for arm in arms:
        try:
            cell, unused = build_cell(request, arm)
            cells.append(cell)
            inert.append(unused)
        except (ValueError, KeyError, OSError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            troubles.append(f"{arm}: {text}" if arm else str(text))
    if not troubles and (useless := sorted(request.own_keys() & set.intersection(*inert))):
        troubles.append(
            f"nothing uses {', '.join(useless)}. A part takes its bindings only where it is bound "
            "by reference, such as mean_flow.weight = @adaptive()"
        )
    if troubles:
        raise ValueError("\n".join(troubles))
    return cells


def build_cell(request: Request, arm: str) -> tuple[Cell, set[str]]:
    """The run of one arm, and the keys that it does not use."""
    request.parse()
    with gin_setup.arm(arm):
        experiment = run()
    operative = gin_setup.operative_text()
    prefix = f"{arm}/" if arm else ""
    params = {
        key.removeprefix(prefix): value for key, value in gin_setup.bindings_of(operative).items()
    }
    texts = Texts(config=_config_text(request, arm), operative=operative, params=params)
    name = arm or experiment.objective_name
    return Cell(name=name, experiment=experiment, texts=texts), set(gin_setup.inert_bindings(arm))


def _config_text(request: Request, arm: str) -> str:
    command = f"objective-zoo run {request.file}"
    command += f" --arm {arm}" if arm else ""
    command += "".join(f" --set {binding!r}" for binding in request.bindings)
    return f"# {command}\n\n{gin_setup.full_text()}\n"


def compare(request: Request, out: Path, *, resume: bool = False) -> list[Result]:
    """Run every cell in its folder under `out`, print the table; the results of those that ended.

    Cells that are finished already are not run again. A cell that fails is recorded and named, the
    others run; SystemExit(1) at the end.
    """
    _check_folder(out, resume)
    cells = build(request)
    recorder = cells[0].experiment.recorder
    started, failed = time.monotonic(), {}
    with recorder.start(name=out.name, folder=out) as parent:
        parent.text(cells[0].texts.config, "config.gin")
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
    _say_where(recorder, out, time.monotonic() - started)
    if failed:
        raise SystemExit("\n".join(f"{name} failed: {error}" for name, error in failed.items()))
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


def _check_folder(out: Path, resume: bool) -> None:
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: continue it with --resume, or choose another --out")
