"""The frozen teacher of a distilled run: loaded from another run, or trained first in this one."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbones.network import FlowNetwork, warm_start
from benchmarks.experiment import Experiment
from benchmarks.results import MODEL, finished_run
from benchmarks.training import fit_experiment
from registry import gin_setup
from trainers import ranks
from trainers.budget import Budget
from trainers.checkpoint import load_module, save_module
from zoo.objectives.flow_matching import FlowMatching
from zoo.teachers import Frozen


def load_teacher(experiment: Experiment) -> None:
    """The frozen teacher's weights, if they come from another run, and the student's from them."""
    if experiment.distilled is None:
        return
    teacher, network = experiment.distilled
    if not teacher.checkpoint:
        return
    try:
        load_module(finished_run(Path(teacher.checkpoint)), network)
        _check_backbone(experiment, Path(teacher.checkpoint))
    except ValueError as error:
        raise ValueError(f"frozen.checkpoint = {teacher.checkpoint!r}: {error}") from None
    _start_from(experiment, teacher, network)


def _check_backbone(experiment: Experiment, folder: Path) -> None:
    """Shapes alone do not tell everything that a backbone is built with, its heads for one."""
    name = f"{experiment.backbone_name}."
    was, now = (
        {
            key.split("/")[-1]: value
            for key, value in gin_setup.bindings_of(text).items()
            if key.split("/")[-1].startswith(name)
        }
        for text in ((folder / "operative.gin").read_text(), gin_setup.operative_text())
    )
    if differing := [k for k in was | now if was.get(k) != now.get(k)]:
        shown = [f"{k} = {was.get(k)} there, {now.get(k)} here" for k in differing]
        raise ValueError(f"its backbone is another one: {'; '.join(shown)}")


def _start_from(experiment: Experiment, teacher: Frozen, network: FlowNetwork) -> None:
    teacher.attach(network.to(experiment.device))
    warm_start(experiment.net, network)


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
    _start_from(experiment, teacher, network)
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
    save_module(folder / f".{MODEL}", state.ema_net)
    if ranks.leads():
        (folder / "spent.json").write_text(json.dumps(asdict(spent)) + "\n")
        (folder / f".{MODEL}").rename(folder / MODEL)  # there, or not: a resumed run looks for it
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
