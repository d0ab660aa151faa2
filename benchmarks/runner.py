"""What one run does: train its teacher if it has one, train, sample, measure, record.

The run's folder holds

    config.gin  operative.gin  objective.txt     what it was
    record.jsonl                                 what happened, step by step (see tracking.py)
    checkpoints/  teacher/checkpoints/           to continue it
    model.safetensors  teacher/model.safetensors the averaged weights that were measured
    samples.safetensors  samples.png             drawn from the same noise in every run of a seed
    result.json                                  the figures; a run that has one is finished
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from backbones.network import FlowNetwork, warm_start
from benchmarks import evaluate
from benchmarks.experiment import Experiment
from benchmarks.images import save_grid, save_scatter
from benchmarks.map_error import ClosedForm, map_error
from benchmarks.provenance import provenance
from registry import gin_setup
from trainers.budget import Budget
from trainers.callbacks import (
    Callback,
    CheckpointCallback,
    EmaCallback,
    MetricsLog,
    PeriodicEvaluation,
    ProgressBar,
)
from trainers.checkpoint import load_module, save_module
from trainers.loop import fit
from trainers.state import TrainState
from zoo.objectives.flow_matching import FlowMatching
from zoo.teachers import Frozen

NUM_SHOWN = 64  # samples kept per NFE
MODEL, RESULT, SAMPLES = "model.safetensors", "result.json", "samples.safetensors"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of a finished run. `steps`, `images` and `seconds` include its teacher's."""

    name: str
    objective: str
    backbone: str
    sampler: str
    seed: int
    values: dict[str, float]  # "nfe1/fd_...", floors by name
    num_params: int
    steps: int
    images: int
    seconds: float
    teacher_steps: int = 0

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps

    def save(self, folder: Path) -> None:
        (folder / RESULT).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Result:
        return cls(**json.loads((folder / RESULT).read_text()))


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The gin text that made the run, and the part of it that took effect."""

    config: str
    operative: str
    params: Mapping[str, str]


def execute(
    experiment: Experiment, texts: Texts, record: Any, folder: Path, *, resume: bool = False
) -> Result:
    """Run it in `folder`, or continue what is there; returns and saves the result."""
    folder.mkdir(parents=True, exist_ok=True)
    _describe(experiment, texts, record)
    teacher = _prepare_teacher(experiment, record, folder / "teacher", resume)

    state = _fit(experiment, record, folder, resume, done=teacher)
    net = state.ema_net
    save_module(folder / MODEL, net)
    values = dict(_measure(experiment, net))
    record.metrics(values, state.step)
    _draw_samples(experiment, net, record, folder)
    result = Result(
        name=record.name,
        objective=experiment.objective_name,
        backbone=experiment.backbone_name,
        sampler=experiment.sampler_name,
        seed=experiment.seed,
        values=values,
        num_params=experiment.num_params,
        steps=state.step + teacher.steps,
        images=state.images + teacher.images,
        seconds=state.seconds + teacher.seconds,
        teacher_steps=teacher.steps,
    )
    result.save(folder)
    record.artifact(folder / RESULT)
    return result


class Stopped(KeyboardInterrupt):
    """A signal ended the run; its checkpoint continues it."""


def finished_run(folder: Path) -> Path:
    """The weights of the finished run in `folder`; ValueError if there is none."""
    if not (folder / RESULT).exists():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{RESULT}"))
        hint = f" There are runs in it: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} holds no finished run (no {RESULT}).{hint}")
    return folder / MODEL


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


def _prepare_teacher(experiment: Experiment, record: Any, folder: Path, resume: bool) -> Spent:
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
        net=net.requires_grad_(True),
        teacher=None,
        optimizer=experiment.teacher_optimizer,
        budget=_scaled(experiment.budget, share),
    )
    state = _fit(teaching, record, folder, resume, prefix="teacher/")
    net.load_state_dict(state.ema_net.state_dict())
    spent = Spent(state.step, state.images, state.seconds)
    (folder / "spent.json").write_text(json.dumps(asdict(spent)) + "\n")
    save_module(folder / f".{MODEL}", net)
    (folder / f".{MODEL}").rename(folder / MODEL)  # there, or not: a resumed run looks for it
    return spent


def _scaled(budget: Budget, share: float) -> Budget:
    amount = budget.amount * share
    return _of(budget, amount if budget.unit == "seconds" else max(1, int(amount)))


def _rest(budget: Budget, share: float) -> Budget:
    amount = budget.amount - _scaled(budget, share).amount
    return _of(budget, amount if budget.unit == "seconds" else max(1, amount))


def _of(budget: Budget, amount: float) -> Budget:
    given: dict[str, Any] = {budget.unit: amount}
    return Budget(**given)


def _fit(
    experiment: Experiment,
    record: Any,
    folder: Path,
    resume: bool,
    *,
    prefix: str = "",
    done: Spent | None = None,
) -> TrainState:
    """Train what `experiment` says, less what the teacher has spent; Stopped if a signal came."""
    budget = experiment.budget
    if done and done.steps and experiment.teacher:
        budget = _rest(budget, experiment.teacher.pretrain)

    def log(values: dict[str, float], step: int) -> None:
        record.metrics({prefix + name: value for name, value in values.items()}, step)

    callbacks: list[Callback] = [
        EmaCallback(decays=(experiment.ema_decay,)),
        MetricsLog(record=log, every=experiment.log_every),
        ProgressBar(label=f"  {record.name}{' (teacher)' if prefix else ''}"),
    ]
    if not prefix:
        callbacks.append(
            PeriodicEvaluation(
                fn=lambda state: dict(_measure(experiment, state.ema_net)),
                every=experiment.evaluate_every,
                at_end=False,
            )
        )
    callbacks.append(CheckpointCallback(every_seconds=experiment.checkpoint_seconds))
    state = fit(
        net=experiment.net,
        objective=experiment.objective,
        dataset=experiment.dataset,
        batch_size=experiment.batch_size,
        budget=budget,
        engine=experiment.engine,
        optimizer=experiment.optimizer,
        schedule=experiment.schedule,
        seed=experiment.seed,
        device=experiment.device,
        callbacks=callbacks,
        folder=folder,
        resume=resume,
    )
    if state.stop:
        raise Stopped(f"stopped by {state.stop} at step {state.step}; continue with --resume")
    return state


def _measure(experiment: Experiment, net: Callable[..., Any]) -> Mapping[str, float]:
    values = dict(
        evaluate.evaluate(
            net,
            experiment.sampler,
            experiment.nfe,
            experiment.metric,
            experiment.dataset,
            experiment.num_samples,
            experiment.seed,
            device=experiment.device,
        )
    )
    if isinstance(experiment.dataset, ClosedForm):
        values |= dict(map_error(net, experiment.dataset, device=experiment.device))
    return values


def draw_samples(
    experiment: Experiment, net: Callable[..., Any], nfe: tuple[int, ...], num: int, seed: int
) -> dict[int, Tensor]:
    """`num` samples at each NFE from the same noise and labels."""
    x1 = evaluate.noise(experiment.dataset.shape, num, seed).to(experiment.device)
    cond = experiment.dataset.sample_labels(num)
    cond = cond and {name: value.to(experiment.device) for name, value in cond.items()}
    return {
        n: evaluate.draw(net, sampler, x1, cond, seed).cpu()
        for n, sampler in evaluate.samplers_for(experiment.sampler, nfe).items()
    }


def picture(rows: Mapping[str, Tensor], path: Path, reference: Tensor | None = None) -> Path | None:
    """A grid of images, a scatter plot of 2-D points; None for data that are neither."""
    shape = next(iter(rows.values())).shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3):
        return save_grid(list(rows.values()), path, titles=list(rows))
    if tuple(shape) == (2,):
        return save_scatter(rows, path, reference)
    return None


def _draw_samples(
    experiment: Experiment, net: Callable[..., Any], record: Any, folder: Path
) -> None:
    two_d = tuple(experiment.dataset.shape) == (2,)
    num = experiment.num_samples if two_d else min(NUM_SHOWN, experiment.num_samples)
    samples = draw_samples(experiment, net, experiment.nfe, num, experiment.seed)
    save_file({f"nfe{n}": x.contiguous() for n, x in samples.items()}, folder / SAMPLES)
    rows = {f"NFE {n}": x if two_d else x[:20] for n, x in samples.items()}
    reference = experiment.dataset.reference(num, experiment.seed)[0] if two_d else None
    if path := picture(rows, folder / "samples.png", reference):
        record.artifact(path)


def _describe(experiment: Experiment, texts: Texts, record: Any) -> None:
    record.tags(
        {
            "arm": record.name,
            "objective": experiment.objective_name,
            "backbone": experiment.backbone_name,
            "sampler": experiment.sampler_name,
            "data": experiment.dataset.identity(),
            **provenance(),
        }
    )
    measuring = evaluate.provenance(
        experiment.metric, experiment.dataset, experiment.num_samples, experiment.seed
    )
    record.tags({f"measured.{name}": value for name, value in measuring.items()})
    record.params({**texts.params, "parameters": experiment.num_params})
    if experiment.derivative_error:
        record.metrics(experiment.derivative_error, step=0)
    record.text(texts.config, "config.gin")
    record.text(texts.operative, "operative.gin")
    record.text(f"{experiment.objective!r}\n", "objective.txt")


def load_run(experiment: Experiment, folder: Path) -> FlowNetwork:
    """The measured weights of a finished run, in the network that its configuration builds."""
    load_module(folder / MODEL, experiment.net)
    return experiment.net.to(experiment.device).eval()
