"""The registries, one per kind of part.

Importing `zoo`, `backbones`, `trainers` or `benchmarks` fills them.
"""

from __future__ import annotations

import inspect

from registry.core import Registry
from registry.protocols.parts import check_differentiates
from registry.sampling import check_needs, check_trains

__all__ = [
    "backbones",
    "couplings",
    "datasets",
    "derivatives",
    "engines",
    "extractors",
    "guidance_laws",
    "heads",
    "kind_of",
    "kinds",
    "launchers",
    "metrics",
    "objectives",
    "optimizers",
    "paths",
    "pruners",
    "recorders",
    "residuals",
    "samplers",
    "schedules",
    "teachers",
    "time_laws",
    "vaes",
    "weights",
]


def kind_of(part: object) -> Registry | None:
    """The registry that has the part's class, or else its nearest base; None if none has.

    A class stands for itself: `kind_of(MeanFlow)` is `kind_of(MeanFlow())`.
    """
    for ancestor in (part if isinstance(part, type) else type(part)).__mro__:
        for kind in kinds:
            if kind.holds(ancestor):
                return kind
    return None


def _check_objective(name: str, cls: type) -> None:
    _check_names(name, cls, "heads")
    check_trains(name, cls)
    check_differentiates(name, cls)
    _check_call(name, cls, "loss", ("net", "batch", "rng"))


def _check_head(name: str, cls: type) -> None:
    _check_names(name, cls, "keys")
    if not isinstance(found := getattr(cls, "needs_r", None), bool):
        raise ValueError(
            f"{name!r} declares needs_r = {found!r}; it needs needs_r: ClassVar = True if its "
            "outputs depend on the end r of the step, as u does, and False if they do not"
        )
    _check_call(name, cls, "forward", ("features", "c"))


def _check_sampler(name: str, cls: type) -> None:
    if "nfe" not in inspect.signature(cls).parameters:
        raise ValueError(f"sampler {name!r} needs a field `nfe`, its number of network calls")
    _check_call(name, cls, "__call__", ("net", "x1", "cond", "rng"))
    check_needs(name, cls)


def _check_launcher(name: str, cls: type) -> None:
    _check_call(name, cls, "__call__", ("jobs", "run_cell"))


def _check_names(name: str, cls: type, attribute: str) -> None:
    found = getattr(cls, attribute, None)
    if not (found and isinstance(found, tuple) and all(isinstance(key, str) for key in found)):
        raise ValueError(
            f"{name!r} declares {attribute} = {found!r}; "
            f'it needs a tuple of output names, such as {attribute}: ClassVar = ("u",)'
        )


def _check_call(name: str, cls: type, method: str, wanted: tuple[str, ...]) -> None:
    found = getattr(cls, method, None)
    if not callable(found):
        raise ValueError(f"{name!r} needs a method {method}(self, {', '.join(wanted)})")
    try:
        inspect.signature(found).bind(None, *wanted)
    except TypeError:
        raise ValueError(
            f"{name!r} defines {method}{inspect.signature(found)}; "
            f"it must accept {method}(self, {', '.join(wanted)})"
        ) from None


objectives = Registry("objective", _check_objective)
heads = Registry("head", _check_head)
backbones = Registry("backbone")
paths = Registry("path")
time_laws = Registry("time law")
guidance_laws = Registry("guidance law")
couplings = Registry("coupling")
derivatives = Registry("derivative")
residuals = Registry("residual")
weights = Registry("weight")
teachers = Registry("teacher")
samplers = Registry("sampler", _check_sampler)
datasets = Registry("data set")
vaes = Registry("VAE")
metrics = Registry("metric")
extractors = Registry("feature extractor")
engines = Registry("engine")
optimizers = Registry("optimizer")
schedules = Registry("schedule")
recorders = Registry("recorder")
launchers = Registry("launcher", _check_launcher)
pruners = Registry("pruner")

kinds = (
    objectives,
    heads,
    backbones,
    paths,
    time_laws,
    guidance_laws,
    couplings,
    derivatives,
    residuals,
    weights,
    teachers,
    samplers,
    datasets,
    vaes,
    metrics,
    extractors,
    engines,
    optimizers,
    schedules,
    recorders,
    launchers,
    pruners,
)
