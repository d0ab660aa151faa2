"""One cell of a comparison, run from its folder in whichever process.

Whoever plans a comparison writes into the folder of each cell

    config.gin   all of the cell's gin text
    cell.json    its name, arm and tags

and starts the record of the comparison in the folder above. `run_cell` then begins the cell, goes
on from its newest checkpoint, or only closes the record of one that was killed behind its result.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.experiments import defaults
from benchmarks.experiments.build import run
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.pruning import PRUNED, Pruned, check_pruner
from benchmarks.files import alone
from benchmarks.records.jsonl import read_record, read_start
from benchmarks.records.recorders import NullRun
from benchmarks.runs.execute import Texts, execute
from benchmarks.runs.initial_weights import load_initial_weights
from benchmarks.runs.measure import measured_names
from benchmarks.runs.result import RESULT
from registry import gin_setup
from registry.gin_errors import said
from registry.protocols import Ended, Recorder, RunRecord
from trainers import ranks

CELL, CONFIG, LOCK = "cell.json", "config.gin", "cell.lock"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a cell is called and where it belongs; `headline` is printed when it starts."""

    name: str
    id: str
    arm: str  # '' outside every arm
    headline: str
    tags: Mapping[str, str]

    def save(self, folder: Path, config: str) -> None:
        """Prepare the folder; what is there of the same cell stays."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(config)
        partial = folder / f".{CELL}"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.rename(folder / CELL)

    @classmethod
    def load(cls, folder: Path) -> Cell:
        if not (folder / CELL).exists():
            raise ValueError(f"{folder} has no {CELL}; `objective-zoo grid` prepares such folders")
        return cls(**json.loads((folder / CELL).read_text()))


def run_cell(folder: Path) -> Ended:
    """Run the cell in `folder` and say how it ended; whatever goes wrong in it is recorded."""
    cell = Cell.load(folder)
    print(cell.headline, file=sys.stderr, flush=True)
    try:
        gin_setup.parse([folder / CONFIG])
        with (
            alone(folder / LOCK, "this cell"),
            _recorder(cell.arm).start(cell.name, folder, folder.parent, cell.tags) as record,
        ):
            record.tags(_outlived(folder))
            if (folder / RESULT).exists():
                record.artifact(folder / RESULT)
            else:
                ranks.from_leader(folder.resolve())
                _execute(cell, folder, record)
    except KeyboardInterrupt as stopped:
        return Ended(cell.name, "stopped", str(stopped) or "interrupted")
    except Pruned as pruned:
        return Ended(cell.name, "pruned", str(pruned))
    except Exception as error:
        log.exception("the run %s failed", cell.name)
        ranks.fail_together(said(error))
        return Ended(cell.name, "failed", said(error))
    return Ended(cell.name, "finished")


def follow() -> None:
    """Take part in every cell that the leading process runs, recording nothing."""

    def announced() -> Path | None:
        ranks.wait_at_most()  # the leader closes its record
        return ranks.from_leader(None)

    while (folder := announced()) is not None:
        try:
            _execute(Cell.load(folder), folder, NullRun(folder.name))
        except (KeyboardInterrupt, Pruned):
            continue
        except Exception as error:
            ranks.fail_together(said(error))


def _execute(cell: Cell, folder: Path, record: RunRecord) -> None:
    def built() -> Experiment:
        gin_setup.parse([folder / CONFIG])
        return build(cell.arm)

    experiment = ranks.together(built, Exception)
    texts = texts_of(cell.arm, (folder / CONFIG).read_text())
    execute(experiment, texts, record, folder, resume=True)


def build(arm: str) -> Experiment:
    """The run of an arm ('' is outside every arm), by what was parsed last."""
    with gin_setup.arm(arm):
        experiment = run()
    load_initial_weights(experiment)
    if pruner := experiment.pruner:
        every, budget = experiment.evaluate_every, experiment.budget
        measured = measured_names(experiment, pruner.metric)
        check_pruner(pruner, experiment.recorder, every, budget, measured)
    return experiment


def texts_of(arm: str, config: str) -> Texts:
    """The texts of the run that was just built."""
    prefix = f"{arm}/" if arm else ""
    params = {k.removeprefix(prefix): v for k, v in gin_setup.operative_values().items()}
    return Texts(config=config, operative=gin_setup.operative_text(), params=params)


def _outlived(folder: Path) -> dict[str, str]:
    """The tags of an earlier end, emptied: MLflow forgets no tag."""
    tags = read_record(folder).tags if read_start(folder) else {}
    return {name: "" for name in ("error", PRUNED) if tags.get(name)}


def _recorder(arm: str) -> Recorder:
    return gin_setup.build("run.recorder", arm) or defaults.recorder()
