"""What a run trains before its objective, by flow matching, and what that takes of the budget.

    teacher     the frozen teacher of its objective, for frozen.pretrain of the budget
    pretrain    the network itself, for run.pretrain of the budget: an objective without a trained
                teacher starts from it

Each has a folder of its name inside the run's. Both leave their averaged weights, from which the
network starts; its averages, its optimizer and its schedule then begin anew.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbones.network import FlowNetwork, warm_start
from benchmarks.experiments.experiment import Experiment
from benchmarks.runs.initial_weights import attach_teacher
from benchmarks.runs.passes import passes_per_step
from benchmarks.runs.result import MODEL
from benchmarks.runs.training import fit_experiment
from registry.protocols import RunRecord
from trainers import ranks
from trainers.budget import Budget
from trainers.checkpoints.weights import load_module, save_module
from trainers.checkpoints.whole_files import file_sha256, read_json, write_json
from zoo.objectives.flow_matching import FlowMatching

SPENT = "spent.json"
_IN_WORDS = {"teacher": "its teacher: flow matching", "pretrain": "flow matching"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """What was trained first, "teacher" or "pretrain", and what it took; "" for nothing."""

    what: str = ""
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    weights_sha256: str = ""  # of the file MODEL; '' in a folder of an earlier version

    @property
    def as_result(self) -> dict[str, Any]:
        """As the result of the run has it, such as teacher_steps and teacher_seconds."""
        took = {"steps": self.steps, "seconds": self.seconds}
        return {f"{self.what}_{name}": value for name, value in took.items()} if self.what else {}


def train_first(experiment: Experiment, record: RunRecord, folder: Path, resume: bool) -> Spent:
    """Train what the run in `folder` trains first, and start the network from it."""
    what, network = experiment.first_phase
    if network is None:
        return Spent()
    folder = folder / what
    made = (folder / MODEL).exists() and (folder / SPENT).exists()
    spent = _found(folder) if resume and made else None
    if spent is None:
        share = f"{experiment.first_share:.0%}"
        log.info("  first %s with %s of the budget", _IN_WORDS[what], share)
        # A copy, since an engine may leave its network in pieces.
        first = first_of(experiment, copy.deepcopy(network))
        spent = _train(first, record, folder, resume)
    load_module(folder / MODEL, network)
    if experiment.teacher is not None:
        attach_teacher(experiment, experiment.teacher, network)
    else:
        warm_start(experiment.net, network)
    return replace(spent, what=what)  # files of earlier versions do not say it


def first_of(experiment: Experiment, net: FlowNetwork) -> Experiment:
    """The run that trains `net` by flow matching, on the first part of the experiment's budget."""
    return replace(
        experiment,
        objective=FlowMatching(),
        net=net.requires_grad_(True),
        teacher=None,
        pretrained=None,
        optimizer=experiment.teacher_optimizer,
        budget=_scaled(experiment.budget, experiment.first_share),
        evaluate_every=0,
        power_emas=(),
        ema_snapshots=0,
    )


def after_first(experiment: Experiment) -> Experiment:
    """The run with the rest of the budget, exact to the step."""
    budget = experiment.budget
    amount = budget.amount - _scaled(budget, experiment.first_share).amount
    amount = amount if budget.unit == "seconds" else max(1, amount)
    return replace(experiment, budget=_of(budget, amount))


def _found(folder: Path) -> Spent | None:
    """What the finished training in `folder` took; None, and a warning, if a file is damaged."""
    goes_on = "so what is trained first goes on from its checkpoint"
    try:
        spent = Spent(**read_json(folder / SPENT))
    except (ValueError, TypeError):
        log.warning("%s cannot be read, %s", folder / SPENT, goes_on)
        return None
    recorded = spent.weights_sha256
    if recorded and file_sha256(folder / MODEL) != recorded:
        log.warning(
            "%s was changed after it was written (SHA-256 differs), %s", folder / MODEL, goes_on
        )
        return None
    return spent


def _train(first: Experiment, record: RunRecord, folder: Path, resume: bool) -> Spent:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}/"
    record.metrics({f"{prefix}cost/passes_per_step": passes_per_step(first).total}, 0)
    state = fit_experiment(first, record, folder, resume, prefix=prefix)
    save_module(folder / MODEL, state.ema_net)
    digest = file_sha256(folder / MODEL) if ranks.leads() else ""
    spent = Spent(folder.name, state.step, state.images, state.seconds, digest)
    if ranks.leads():
        write_json(folder / SPENT, asdict(spent))  # last: a resumed run looks for it
    ranks.gathered(None)
    return spent


def _scaled(budget: Budget, share: float) -> Budget:
    amount = budget.amount * share
    return _of(budget, amount if budget.unit == "seconds" else max(1, int(amount)))


def _of(budget: Budget, amount: float) -> Budget:
    given: dict[str, Any] = {budget.unit: amount}
    return Budget(**given)
