"""At which NFEs a run is sampled, by which steps (t, r), and whether these are trained and guided.

A sampler is run on a network that answers 0 and notes what it is asked. So this holds for every
sampler, whatever its grid of times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import registry
from benchmarks.experiments.experiment import Experiment
from benchmarks.metrics import evaluate
from registry.protocols import Cond, Objective, Sampler, parts, required_heads
from zoo.guidance import Guided, PartlyGuided
from zoo.samplers import valid_samplers
from zoo.samplers.guided import GuidedSampler

MOST_NFE = 256  # up to which an error lists what is allowed

log = logging.getLogger(__name__)


class _Untrained(Exception):
    """A step that is never trained; it ends the trial, since one is enough."""

    def __init__(self, t: float, r: float):
        self.t, self.r = t, r


def possible_nfe(sampler: Sampler, nfe: Sequence[int]) -> tuple[int, ...]:
    """Those NFEs of a run that its sampler can have; a warning says why the others are left out.

    A comparison measures its arms at the same NFEs, and an arm may have a sampler that cannot have
    them all: one of a one-step generator has one. ValueError if it can have none of them.
    """
    _, refused = evaluate.possible_samplers(sampler, nfe)
    left = tuple(n for n in nfe if n not in refused)
    evaluate.samplers_for(sampler, left or nfe)
    if refused:
        log.warning(
            "run.nfe: @%s() is not measured at %s, which it cannot have (%s). It is measured at %s",
            *(registry.samplers.name_of(sampler), _named(refused), next(iter(refused.values()))),
            _named(left),
        )
    return left


def check_steps(experiment: Experiment, nfe: Sequence[int]) -> None:
    """ValueError for an NFE at which samples take a step that the objective never trains."""
    if _trained_steps(experiment.objective) is _everything:
        return
    refused: dict[int, _Untrained] = {}
    for n, sampler in evaluate.samplers_for(experiment.sampler, nfe).items():
        try:
            _steps(experiment, sampler)
        except _Untrained as untrained:
            refused[n] = untrained
    if refused:
        first, step = next(iter(refused.items()))
        raise ValueError(
            f"@{experiment.sampler_name}() at {_named(refused)} takes steps that objective "
            f"{experiment.objective_name!r} never trains with these settings; at {first} NFE, the "
            f"step from t = {step.t:g} to r = {step.r:g}. {_allowed(experiment)}"
        )


def warn_of_unguided(experiment: Experiment) -> None:
    """Say which NFE are sampled without the guidance that the others have learned."""
    objective = experiment.objective
    if not (isinstance(objective, PartlyGuided) and objective.guidance_scale != 1):
        return
    plain = [n for n, words in _words_by_nfe(experiment).items() if not words]
    if plain:
        name, scale, inner = experiment.objective_name, objective.guidance_scale, experiment.sampler
        while isinstance(inner, GuidedSampler):
            inner = inner.sampler
        log.warning(
            "samples at %s are not guided: %s.guidance_scale = %g reaches longer steps alone. To "
            "guide them when sampling, bind run.sampler = @cfg(), cfg.sampler = @%s(), cfg.scale = "
            "%g and cfg.least_nfe = %d",
            *(_named(plain), name, scale, registry.samplers.name_of(inner), scale, min(plain)),
        )


def guidance_in_words(experiment: Experiment) -> str:
    """The guidance of the samples, by training and by the sampler, and at which NFE they differ."""
    by_words: dict[str, list[int]] = {}
    for n, words in _words_by_nfe(experiment).items():
        by_words.setdefault("; ".join(words) or "none", []).append(n)
    if len(by_words) == 1:
        return next(iter(by_words))
    return " | ".join(f"at {_named(nfe)}: {words}" for words, nfe in by_words.items())


def _trained_steps(objective: Objective) -> Callable[[float, float], bool]:
    declared: Callable[[float, float], bool] = getattr(objective, "trains_step", _everything)
    return declared


def _everything(t: float, r: float) -> bool:
    return True


def _words_by_nfe(experiment: Experiment) -> dict[int, list[str]]:
    """What guides the samples at each NFE of the run."""
    found = {}
    for n, sampler in evaluate.samplers_for(experiment.sampler, experiment.nfe).items():
        words = []
        if _guided(experiment.objective) and _reached(experiment, sampler):
            words.append(_in_words(experiment.objective, "guidance_interval", "training"))
        if _guided(sampler):
            words.append(_in_words(sampler, "interval", "sampling"))
        found[n] = words
    return found


def _guided(part: object) -> bool:
    return isinstance(part, Guided) and part.guidance_scale != 1


def _reached(experiment: Experiment, sampler: Sampler) -> bool:
    """Whether the guidance of training is in a step of this sampler."""
    objective = experiment.objective
    if not isinstance(objective, PartlyGuided):
        return True
    return any(objective.guides(t, r) for t, r in _steps(experiment, sampler))


def _steps(experiment: Experiment, sampler: Sampler) -> list[tuple[float, float]]:
    """The steps (t, r) of the sampler; _Untrained at the first that is never trained."""
    objective = experiment.objective
    trains_step, heads, asked = _trained_steps(objective), required_heads(objective), []

    def net(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
        step = float(t[0]), float(r[0])
        if not trains_step(*step):
            raise _Untrained(*step)
        asked.append(step)
        return {key: torch.zeros_like(x) for key in heads}

    x1 = torch.zeros(1, *experiment.dataset.shape, dtype=torch.float64)
    label = {"label": torch.zeros(1, dtype=torch.int64)}
    with torch.no_grad():
        sampler(net, x1, label, torch.Generator().manual_seed(0))
    return asked


def _allowed(experiment: Experiment) -> str:
    """What to bind instead."""
    found = []
    for n in range(1, MOST_NFE + 1):
        try:
            (sampler,) = evaluate.samplers_for(experiment.sampler, (n,)).values()
            _steps(experiment, sampler)
        except (_Untrained, ValueError):  # ValueError: an NFE that the sampler cannot have
            continue
        found.append(n)
    others = ", ".join(f"@{name}()" for name in valid_samplers(experiment.objective))
    if found:
        return (
            f"Allowed are {', '.join(map(str, found))} NFE: change run.nfe (or --nfe), the "
            f"objective's settings, or run.sampler, which may be {others}"
        )
    return f"No NFE is allowed: bind another run.sampler of {others}, or change the settings"


def _in_words(part: Any, interval: str, by: str) -> str:
    bounds: Mapping[str, Any] = dict(parts(part))
    within = f" inside {bounds[interval]}" if interval in bounds else ""
    return f"scale {part.guidance_scale:g}{within}, by {by}"


def _named(nfe: Iterable[int]) -> str:
    return f"{', '.join(map(str, nfe))} NFE"
