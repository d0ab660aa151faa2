"""Where the networks of a run start: from pretrained weights, or from a teacher trained first."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backbones.layouts import NUM_HEADS
from backbones.network import FlowNetwork, warm_start
from backbones.noise import NoiseNetwork
from benchmarks.experiment import Experiment
from benchmarks.pretrained import is_run, load_pretrained
from benchmarks.results import MODEL, finished_run
from benchmarks.training import fit_experiment
from registry import gin_setup
from trainers import ranks
from trainers.budget import Budget
from trainers.weights import load_module, save_module
from zoo.objectives.flow_matching import FlowMatching
from zoo.teachers import Frozen


def load_teacher(experiment: Experiment) -> None:
    """Give the run's networks the weights, of its teacher and its own, that were made before."""
    if experiment.start_from:
        with _naming("run.start_from", experiment.start_from):
            source = _pretrained(experiment, experiment.start_from, experiment.start_layout)
            _start_from(experiment, source)
    if experiment.distilled is None or not experiment.distilled[0].checkpoint:
        return
    teacher, network = experiment.distilled
    folder = Path(teacher.checkpoint)
    with _naming("frozen.checkpoint", teacher.checkpoint):
        if is_run(folder):
            load_module(finished_run(folder), network)
            _check_backbone(experiment, folder)
        else:
            network = _pretrained(experiment, teacher.checkpoint, teacher.layout)
        _attach(experiment, teacher, network)


@contextmanager
def _naming(key: str, value: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key} = {value!r}: {error}") from None


def _pretrained(experiment: Experiment, path: str, layout: str) -> FlowNetwork:
    """An exported network or a public code's, for data of the run's shape."""
    fields = getattr(experiment.net.trunk, "fields", {})
    num_heads = None if fields.get("dim") in NUM_HEADS else fields.get("num_heads")
    network = load_pretrained(Path(path), layout, num_heads)
    made_for = getattr(network.trunk, "fields", {})
    dataset = experiment.dataset
    for what, theirs, ours in (
        ("shape", tuple(made_for["shape"]), tuple(dataset.shape)),
        ("number of classes", made_for["num_classes"], dataset.num_classes),
    ):
        if theirs != ours:
            raise ValueError(
                f"the {what} of its data is {theirs}; that of {dataset.name} is {ours}"
            )
    return network


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


def _attach(experiment: Experiment, teacher: Frozen, network: FlowNetwork) -> None:
    """The teacher, and the student that starts from it unless it starts from other weights."""
    teacher.attach(network.to(experiment.device))
    if not experiment.start_from:
        _start_from(experiment, network)


def _start_from(experiment: Experiment, network: FlowNetwork) -> None:
    if isinstance(network, NoiseNetwork):
        raise ValueError(
            "it predicts noise, so a network of velocities cannot start as its equal; as a teacher "
            "it needs run.start_from, other weights for the student"
        )
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
