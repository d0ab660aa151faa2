"""`run()` takes everything that one run needs from gin, and returns it built and checked.

`run` is the only gin.configurable of the project. It resolves what is not bound, builds the network
and checks the whole, the derivative and one loss on a few rows included. So everything that does
not fit together is reported before any training.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import gin
import torch

import registry
from backbones.network import FlowNetwork, build_network
from backbones.parametrisations.equations import RawVelocity
from benchmarks.experiments import defaults
from benchmarks.experiments.arguments import (
    bound,
    check_built,
    check_counts,
    check_seed,
    check_start,
    decays,
    one_budget,
    power_widths,
)
from benchmarks.experiments.checks import checked
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.network_size import check_size
from benchmarks.experiments.opening import for_new_runs, is_opened
from benchmarks.experiments.sampled_steps import possible_nfe
from registry.protocols import (
    Dataset,
    Engine,
    JointDerivative,
    Metric,
    Objective,
    Optimizer,
    Parametrisation,
    Pruner,
    Recorder,
    Sampler,
    Schedule,
    has_whole_weights,
    parts,
    required_heads,
    runs_in_several_processes,
)
from registry.ranges import NotNegative, Probability, Range
from trainers import ranks
from trainers.budget import Budget
from trainers.devices import device_of
from trainers.engines import as_trained
from zoo.samplers import check_sampler, on_path_of
from zoo.teachers import Frozen

# A default that gin has no text for, and so leaves out of what it records: the texts and the ids
# of runs that came before this parameter stay as they were.
RAW_VELOCITY = RawVelocity()

log = logging.getLogger(__name__)


@gin.configurable("run")
def run(
    *,
    objective: Objective | None = None,
    backbone: type | None = None,
    dataset: Dataset | None = None,
    heads: Sequence[type] | None = None,
    parametrisation: Parametrisation = RAW_VELOCITY,
    sampler: Sampler | None = None,
    engine: Engine | None = None,
    optimizer: Optimizer | None = None,
    teacher_optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    metric: Metric | None = None,
    recorder: Recorder | None = None,
    steps: int | None = None,
    images: int | None = None,
    seconds: float | None = None,
    batch_size: Annotated[int, Range(1, 10**8)] = 128,
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0,
    ema_decay: float | Sequence[float] = 0.999,
    power_emas: float | Sequence[float] = (),
    ema_snapshots: int = 0,
    nfe: Sequence[int] = (1, 2, 4, 8),
    num_samples: Annotated[int, Range(1, 10**9)] = 1000,
    log_every: int = 50,
    evaluate_every: int = 0,
    checkpoint_seconds: NotNegative = 600.0,
    non_finite: Literal["stop", "skip"] = "stop",
    pruner: Pruner | None = None,
    compile: bool = False,
    start_from: str = "",
    start_layout: str = "",
    warm_start: bool = True,
    pretrain: Probability = 0.0,
    device: str = "auto",
) -> Experiment:
    """Build and check one run; ValueError for anything that does not fit together.

    The budget is one of `steps`, `images` and `seconds` of training. Samples are drawn with the
    average of the weights at `ema_decay`, or at the first of several, at each of `nfe` network
    calls; those that the sampler cannot have are left out with a warning. `parametrisation` says
    what the readouts of the network mean; a network that is trained first has the same one. The
    network starts as `start_from`: an exported folder, or a public checkpoint of the layout
    `start_layout`; or as flow matching leaves it that first takes `pretrain`, a share of the
    budget; or, unless `warm_start` is False, as its trained teacher. What is trained first, the
    network or its teacher, takes `teacher_optimizer`, by default the run's own. Averages of the
    relative widths `power_emas` are stored `ema_snapshots` times over the budget; `objective-zoo
    ema` makes an average of any width from them. `compile` trains the network, and evaluates its
    teachers, by torch.compile.
    """
    # locals() has the arguments by name, so that they are listed in one place only.
    return checked(_build(**_resolve(**locals())))


def _resolve(
    *, steps: int | None, images: int | None, seconds: float | None, **given: Any
) -> dict[str, Any]:
    """The arguments of `run`, checked one by one, with a default for each part not bound."""
    counts = ("batch_size", "num_samples", "log_every", "evaluate_every")
    with for_new_runs():
        check_counts(given["nfe"], **{name: given[name] for name in counts})
        check_seed(given["seed"])
    check_built(given)
    objective = bound("objective", given["objective"], registry.objectives)
    backbone = bound("backbone", given["backbone"], registry.backbones)
    dataset = bound("dataset", given["dataset"], registry.datasets)
    name = registry.objectives.name_of(objective)
    sampler = on_path_of(objective, given["sampler"] or defaults.sampler(objective))
    with for_new_runs():
        check_sampler(name, objective, sampler)
        check_start(objective, given["pretrain"], given["warm_start"], given["start_from"])
    nfe = tuple(given["nfe"])
    with for_new_runs():
        nfe = possible_nfe(sampler, nfe)
    optimizer = given["optimizer"] or defaults.optimizer()
    return given | {
        "objective": objective,
        "backbone": backbone,
        "dataset": dataset,
        "sampler": sampler,
        "engine": given["engine"] or defaults.engine(),
        "optimizer": optimizer,
        "teacher_optimizer": given["teacher_optimizer"] or optimizer,
        "schedule": given["schedule"] or defaults.schedule(),
        "metric": given["metric"] or defaults.metric(dataset),
        "recorder": given["recorder"] or defaults.recorder(),
        "budget": _budget(steps=steps, images=images, seconds=seconds),
        "ema_decay": decays(given["ema_decay"]),
        "power_emas": power_widths(given["power_emas"], given["ema_snapshots"]),
        "nfe": nfe,
        "device": _device(given["device"]),
    }


def _budget(**amounts: Any) -> Budget:
    budget = Budget(steps=1)  # of a run that is opened, and trained no more
    with for_new_runs():
        budget = one_budget(**amounts)
    return budget


def _build(
    *,
    objective: Objective,
    backbone: type,
    heads: Sequence[type] | None,
    parametrisation: Parametrisation,
    **settings: Any,
) -> Experiment:
    """The run with its networks: its own, and that of a frozen teacher."""
    dataset: Dataset = settings["dataset"]

    def network(keys: Sequence[str], chosen: Sequence[type] | None) -> FlowNetwork:
        of_data = dataset.shape, dataset.num_classes
        made = partial(build_network, backbone, *of_data, keys, chosen, parametrisation)
        check_size(made, _copies(settings), settings["device"])
        # Seeded for each network: what two of them share starts from the same weights.
        torch.manual_seed(settings["seed"])
        return made()

    net = network(required_heads(objective), heads).to(settings["device"])
    teacher = _frozen_teacher(objective)
    if teacher is not None:
        teacher.attach(network(("v",), None).to(settings["device"]))
    if settings["pretrain"] and not is_opened():
        # It stays in the memory of the machine, and a copy of it is trained.
        settings["pretrained"] = network(("v",), None)
    objective = _as_trained(objective, settings["engine"], settings["compile"])
    return Experiment(objective=objective, net=net, teacher=teacher, **settings)


def _copies(settings: Mapping[str, Any]) -> int:
    """At least so many copies of the weights must fit: with gradients and averages, to train them.

    Engines that share a run out to processes have no more than a part of each in one of them.
    """
    if is_opened() or runs_in_several_processes(settings["engine"]):
        return 1
    return 2 + len(settings["ema_decay"]) + len(settings["power_emas"])


def _frozen_teacher(objective: Objective) -> Frozen | None:
    found = [part for _, part in parts(objective) if isinstance(part, Frozen)]
    for teacher in found:
        if not (teacher.checkpoint or teacher.pretrain):
            raise ValueError(
                "the frozen teacher has no network: bind frozen.checkpoint to the folder of a "
                "finished flow-matching run, or frozen.pretrain to a share of the budget, 0.5 say"
            )
    return found[0] if found else None


def _as_trained(objective: Objective, engine: Engine, compile: bool) -> Objective:
    """The objective with derivatives that this engine and the compiler can follow."""
    changed = as_trained(objective, engine, compile)
    if changed is not objective:
        name = registry.derivatives.name_of
        why = "the objective trains its derivative"
        if not has_whole_weights(engine):
            why = f"run.engine = @{registry.engines.name_of(engine)}() shards the weights"
        why = "run.compile = True" if compile else why
        joint = [part for _, part in parts(objective) if isinstance(part, JointDerivative)]
        log.warning(
            "%s: derivatives take a pass of their own, %s",
            why,
            ", ".join(sorted({f"@{name(d.in_own_pass)}() for @{name(d)}()" for d in joint})),
        )
    return changed


def _device(name: str) -> torch.device:
    if name == "auto":
        cuda = f"cuda:{ranks.local_number()}" if ranks.launched() else "cuda"
        return torch.device(cuda if torch.cuda.is_available() else "cpu")
    return device_of(name, "run.device")
