"""Where the networks of a run start: from pretrained weights, or from a teacher trained first."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbones.network import FlowNetwork
from benchmarks.experiments.experiment import Experiment
from benchmarks.runs.initial_weights import _attach
from benchmarks.runs.result import MODEL
from benchmarks.runs.training import fit_experiment
from trainers import ranks
from trainers.budget import Budget
from trainers.checkpoints.weights import load_module, save_module
from trainers.checkpoints.whole_files import write_json
from zoo.objectives.flow_matching import FlowMatching


@dataclass(frozen=True)
class Spent:
    steps: int = 0
    images: int = 0
    seconds: float = 0.0


def prepare_teacher(experiment: Experiment, record: Any, folder: Path, resume: bool) -> Spent:
    """Train the frozen teacher, unless it came from another run, and start the student from it."""
    if experiment.distilled is None:
        return Spent()
    teacher, network = experiment.distilled
    if teacher.checkpoint:
        return Spent()
    if resume and (folder / MODEL).exists():
        load_module(folder / MODEL, network)
        spent = Spent(**json.loads((folder / "spent.json").read_text()))
    else:
        spent = _train_teacher(experiment, teacher.pretrain, network, record, folder, resume)
    _attach(experiment, teacher, network)
    return spent


def _train_teacher(
    experiment: Experiment,
    share: float,
    net: FlowNetwork,
    record: Any,
    folder: Path,
    resume: bool,
) -> Spent:
    print(f"  first its teacher: flow matching with {share:.0%} of the budget", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    teaching = replace(
        experiment,
        objective=FlowMatching(),
        net=copy.deepcopy(net).requires_grad_(True),  # which an engine may leave in pieces
        teacher=None,
        optimizer=experiment.teacher_optimizer,
        budget=_scaled(experiment.budget, share),
    )
    state = fit_experiment(
        teaching, record, folder, resume, budget=teaching.budget, prefix="teacher/"
    )
    spent = Spent(state.step, state.images, state.seconds)
    if ranks.leads():
        write_json(folder / "spent.json", asdict(spent))
    save_module(folder / MODEL, state.ema_net)  # last: a resumed run looks for it
    ranks.gathered(None)
    load_module(folder / MODEL, net)
    return spent


def _scaled(budget: Budget, share: float) -> Budget:
    amount = budget.amount * share
    return _of(budget, amount if budget.unit == "seconds" else max(1, int(amount)))


def rest(budget: Budget, share: float) -> Budget:
    """What the teacher's share leaves, to the step."""
    amount = budget.amount - _scaled(budget, share).amount
    return _of(budget, amount if budget.unit == "seconds" else max(1, amount))


def _of(budget: Budget, amount: float) -> Budget:
    given: dict[str, Any] = {budget.unit: amount}
    return Budget(**given)
