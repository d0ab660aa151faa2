"""One cell of a comparison, run from its folder, in this process or another.

Whoever plans a comparison writes two files into the folder of each cell,

    config.gin   all of the cell's gin text
    cell.json    its name, arm and tags

and starts the record of the comparison in the folder above. `run_cell` then starts the cell, or
goes on from its newest checkpoint. If the cell was killed after its result was written, `run_cell`
only closes its record.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.experiments import defaults
from benchmarks.experiments.build import run
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.pruning import PRUNED, Pruned, check_pruner
from benchmarks.records.jsonl import read_record, read_start
from benchmarks.records.open_run import NullRun
from benchmarks.runs.execute import Texts, execute
from benchmarks.runs.initial_weights import load_initial_weights
from benchmarks.runs.measure import measured_names
from benchmarks.runs.result import RESULT, has_result
from registry import gin_setup
from registry.configuration.gin_errors import message_of
from registry.configuration.own_code import CODE
from registry.protocols import Ended, Recorder, RunRecord
from trainers import ranks
from trainers.checkpoints.locks import alone
from trainers.checkpoints.whole_files import read_json, write_json, write_text

CELL, CONFIG, LOCK = "cell.json", "config.gin", "cell.lock"

Work = Callable[["Cell", Path, RunRecord], None]
"""What all processes of a run do with a cell; a function of a module, which can be sent."""

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
        """Prepare the folder; files of the same cell that are there already are kept."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, config)
        write_json(folder / CELL, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Cell:
        if not (folder / CELL).exists():
            raise ValueError(f"{folder} has no {CELL}; `objective-zoo grid` prepares such folders")
        try:
            return cls(**read_json(folder / CELL))
        except TypeError as problem:
            raise ValueError(f"{folder / CELL} cannot be read: it describes no cell") from problem


def run_cell(folder: Path) -> Ended:
    """Run the cell in `folder` and say how it ended; an error in it is recorded, not raised."""
    cell = Cell.load(folder)
    log.info("%s", cell.headline)
    try:
        gin_setup.parse([folder / CONFIG])
        with (
            alone(folder / LOCK, "this cell"),
            recorder_of(cell.arm).start(cell.name, folder, folder.parent, cell.tags) as record,
        ):
            record.tags(_cleared_tags(folder))
            if has_result(folder):
                record.artifact(folder / RESULT)
            else:
                lead(_execute, cell, folder, record)
    except KeyboardInterrupt as stopped:
        return Ended(cell.name, "stopped", str(stopped) or "interrupted")
    except Pruned as pruned:
        return Ended(cell.name, "pruned", str(pruned))
    except (Exception, SystemExit) as error:  # a part's own code may exit; the other cells go on
        log.exception("the run %s failed", cell.name)
        ranks.fail_together(message_of(error))
        return Ended(cell.name, "failed", message_of(error))
    return Ended(cell.name, "finished")


def lead(work: Work, cell: Cell, folder: Path, record: RunRecord) -> None:
    """Do this work on a cell, together with the processes that follow."""
    ranks.from_leader((work, folder.resolve()))
    work(cell, folder, record)


def follow() -> None:
    """Take part in every cell that the leading process runs or rehearses, and record nothing."""

    def announced() -> tuple[Work, Path] | None:
        ranks.wait_at_most()  # the leader may take long to close its record
        return ranks.from_leader(None)

    while (told := announced()) is not None:
        work, folder = told
        try:
            work(Cell.load(folder), folder, NullRun(folder.name))
        except (KeyboardInterrupt, Pruned):
            continue
        except (Exception, SystemExit) as error:
            ranks.fail_together(message_of(error))


def built(cell: Cell, folder: Path, record: RunRecord) -> Experiment:
    """The run of a cell from the text in its folder, in every process or in none.

    The hashes of the code that the text imports are recorded.
    """

    def from_text() -> Experiment:
        opened = gin_setup.parse([folder / CONFIG])
        made = build(cell.arm)
        if code := gin_setup.code_hashes(opened):
            record.text(json.dumps(code, indent=1) + "\n", CODE)
        return made

    return ranks.together(from_text, Exception)


def _execute(cell: Cell, folder: Path, record: RunRecord) -> None:
    experiment = built(cell, folder, record)
    texts = texts_of(cell.arm, (folder / CONFIG).read_text())
    execute(experiment, texts, record, folder, resume=True)


def build(arm: str) -> Experiment:
    """Build the run of an arm ('' is outside every arm) from what was parsed last."""
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


def _cleared_tags(folder: Path) -> dict[str, str]:
    """The tags that an earlier end has left, set to '': MLflow cannot delete a tag."""
    tags = read_record(folder).tags if read_start(folder) else {}
    return {name: "" for name in ("error", PRUNED) if tags.get(name)}


def recorder_of(arm: str) -> Recorder:
    """The recorder of an arm, from what was parsed last."""
    return gin_setup.build("run.recorder", arm) or defaults.recorder()
