"""The frozen teacher that a run trains first, and what that takes of the run's budget."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbones.network import FlowNetwork
from benchmarks.experiments.experiment import Experiment
from benchmarks.runs.initial_weights import attach_teacher
from benchmarks.runs.result import MODEL
from benchmarks.runs.training import fit_experiment
from registry.protocols import RunRecord
from trainers import ranks
from trainers.budget import Budget
from trainers.checkpoints.weights import load_module, save_module
from trainers.checkpoints.whole_files import file_sha256, read_json, write_json
from zoo.objectives.flow_matching import FlowMatching

SPENT = "spent.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """What the training of the teacher took; nothing where it came from elsewhere."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    weights_sha256: str = ""  # of the file MODEL; '' in a folder of an earlier version


def prepare_teacher(experiment: Experiment, record: RunRecord, folder: Path, resume: bool) -> Spent:
    """Train the frozen teacher, unless it came from another run, and start the student from it."""
    if experiment.distilled is None:
        return Spent()
    teacher, network = experiment.distilled
    if teacher.checkpoint:
        return Spent()
    made = (folder / MODEL).exists() and (folder / SPENT).exists()
    spent = _found(folder) if resume and made else None
    if spent is None:
        log.info(
            "  first its teacher: flow matching with %s of the budget", f"{teacher.pretrain:.0%}"
        )
        # A copy, since an engine may leave its network in pieces.
        teaching = as_teacher(experiment, copy.deepcopy(network))
        spent = _train_teacher(teaching, record, folder, resume)
    load_module(folder / MODEL, network)
    attach_teacher(experiment, teacher, network)
    return spent


def as_teacher(experiment: Experiment, net: FlowNetwork) -> Experiment:
    """The run that trains `net` as the experiment's frozen teacher, on its part of the budget."""
    assert experiment.teacher is not None, "the experiment has no teacher"
    return replace(
        experiment,
        objective=FlowMatching(),
        net=net.requires_grad_(True),
        teacher=None,
        optimizer=experiment.teacher_optimizer,
        budget=_scaled(experiment.budget, experiment.teacher.pretrain),
        evaluate_every=0,
        power_emas=(),
        ema_snapshots=0,
    )


def after_teacher(experiment: Experiment) -> Experiment:
    """The run with the rest of the budget, exact to the step, after its teacher's part."""
    assert experiment.teacher is not None, "the experiment has no teacher"
    budget = experiment.budget
    amount = budget.amount - _scaled(budget, experiment.teacher.pretrain).amount
    amount = amount if budget.unit == "seconds" else max(1, amount)
    return replace(experiment, budget=_of(budget, amount))


def _found(folder: Path) -> Spent | None:
    """What the teacher in `folder` took; None, and a warning, if a file of it is damaged."""
    try:
        spent = Spent(**read_json(folder / SPENT))
    except (ValueError, TypeError):
        log.warning("%s cannot be read, so the teacher goes on from its checkpoint", folder / SPENT)
        return None
    if spent.weights_sha256 and file_sha256(folder / MODEL) != spent.weights_sha256:
        log.warning(
            "%s was changed after it was written (SHA-256 differs), so the teacher goes on from "
            "its checkpoint",
            folder / MODEL,
        )
        return None
    return spent


def _train_teacher(teaching: Experiment, record: RunRecord, folder: Path, resume: bool) -> Spent:
    folder.mkdir(parents=True, exist_ok=True)
    state = fit_experiment(teaching, record, folder, resume, prefix="teacher/")
    save_module(folder / MODEL, state.ema_net)
    digest = file_sha256(folder / MODEL) if ranks.leads() else ""
    spent = Spent(state.step, state.images, state.seconds, digest)
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
