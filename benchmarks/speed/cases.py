"""The cases that a benchmark measures, and a run of one that trains a step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import registry
from benchmarks.experiments.build import run
from benchmarks.experiments.experiment import Experiment
from benchmarks.grids.request import Request
from benchmarks.speed.published_mean_flow import PublishedMeanFlow
from registry import gin_setup
from registry.protocols import Derivative, LossOutput, parts
from trainers.callbacks import MetricsLog
from trainers.engines import as_trained
from trainers.loop import prepared, updates
from zoo.derivatives.methods import with_derivatives
from zoo.objectives.mean_flow import MeanFlow

BASELINE = "flow_matching"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training run to measure; everything that another process needs to build it."""

    request: Request
    bindings: tuple[str, ...]
    group: str = ""  # backbone/precision: what is compared with one baseline
    arm: str
    derivative: str = ""  # registered; "" for an objective without one
    published: bool = False  # trained by the paper's algorithm

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.arm, "published" * self.published or self.derivative)))

    def build(self) -> Experiment:
        """Its run, with the derivative of the case chosen before it is probed."""
        self.request.parse([*self.bindings, "run.recorder = @null()"])
        with gin_setup.arm(self.arm):
            if not self.derivative:
                return run()
            objective = gin_setup.build("run.objective", self.arm)
            chosen = registry.derivatives.build(self.derivative)
            return run(objective=with_derivatives(objective, lambda _: chosen))

    def training(self, experiment: Experiment | None = None) -> SteppedRun:
        """A run of the experiment that `build` gave."""
        experiment = self.build() if experiment is None else experiment
        if self.published:
            ours = experiment.objective
            assert isinstance(ours, MeanFlow)
            experiment = replace(experiment, objective=PublishedMeanFlow.of(ours))
        return SteppedRun(experiment)


def cases_of(
    request: Request,
    *,
    objectives: Sequence[str] = (),
    backbones: Sequence[str] = (),
    precisions: Sequence[str] = ("fp32",),
    derivatives: Sequence[str] = ("one_pass",),
    published: bool = False,
) -> dict[str, list[Case]]:
    """The cases by group, each with the baseline first; an arm without a derivative comes once.

    `objectives` are arms of the file, by default all. The backbone is the file's own by default.
    `published` adds MeanFlow by its paper's algorithm.
    """
    known = request.arms()
    if unknown := sorted({*objectives, BASELINE} - set(known)):
        raise ValueError(
            f"{request.file} has no arm {', '.join(unknown)}; there are: {', '.join(known)}"
        )
    chosen = dict.fromkeys([BASELINE, *(objectives or known)])
    groups: dict[str, list[Case]] = {}
    for backbone, precision, arm in product(backbones or [""], precisions, chosen):
        bindings = [f"run.backbone = @{backbone}"] if backbone else []
        bindings += [f"torch_engine.precision = {precision!r}"]
        case = Case(request=request, bindings=tuple(bindings), arm=arm)
        built = case.build()
        group = f"{built.backbone_name}/{precision}{'/compiled' if built.compile else ''}"
        case = replace(case, group=group)
        differs = any(isinstance(part, Derivative) for _, part in parts(built.objective))
        cases = groups.setdefault(group, [])
        chosen_here = [_as_run(d, built) for d in derivatives] if differs else [""]
        cases += [replace(case, derivative=d) for d in dict.fromkeys(chosen_here)]
        if published and isinstance(built.objective, MeanFlow):
            cases.append(replace(case, published=True))
    return groups


def _as_run(derivative: str, experiment: Experiment) -> str:
    """The name of the derivative that a run takes where this one is bound."""
    taken = as_trained(
        registry.derivatives.build(derivative), experiment.engine, experiment.compile
    )
    return registry.derivatives.name_of(taken)


class SteppedRun:
    """A run that trains a step at a time, with the callbacks that every run has."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        log = MetricsLog(record=lambda values, step: None, every=experiment.log_every)
        self.state = prepared(experiment.training, [log])
        module = self.state.engine.module
        self.networks = [module.net, *module.teachers.values()]
        self._updates = updates(self.state, experiment.training)

    def step(self) -> LossOutput:
        return next(self._updates)
