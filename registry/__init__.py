"""The registries, one per kind of part.

Importing `zoo`, `backbones`, `trainers` or `benchmarks` fills them.
"""

from __future__ import annotations

import inspect
from dataclasses import is_dataclass
from typing import Any

from registry.core import Registry
from registry.differentiation import check_differentiates
from registry.sampling import check_needs, check_trains

__all__ = [
    "backbones",
    "couplings",
    "datasets",
    "derivatives",
    "engines",
    "extractors",
    "features",
    "guidance_laws",
    "heads",
    "kind_of",
    "kinds",
    "launchers",
    "metrics",
    "objectives",
    "optimizers",
    "parametrisations",
    "paths",
    "pruners",
    "recorders",
    "residuals",
    "samplers",
    "schedules",
    "sees_call",
    "teachers",
    "time_laws",
    "vaes",
    "velocities",
    "weights",
]

TWO_ARGUMENTS = ("features", "c")  # of a head's forward in the version before


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
    keys, velocities = getattr(cls, "keys", ()), getattr(cls, "velocities", ())
    if not (isinstance(velocities, tuple) and {*velocities} <= {*keys}):
        raise ValueError(
            f"{name!r} declares velocities = {velocities!r}; it must be a tuple of those of its "
            f"keys {keys} that are velocities"
        )
    if not _accepts(cls, "forward", TWO_ARGUMENTS):
        _check_call(name, cls, "forward", (*TWO_ARGUMENTS, "at"))


def sees_call(head: Any) -> bool:
    """Whether a head, an object or its class, defines forward(self, features, c, at).

    One that was written for an earlier version defines forward(self, features, c).
    """
    cls: Any = head if isinstance(head, type) else type(head)
    named = "at" in inspect.signature(cls.forward).parameters
    return named or not _accepts(cls, "forward", TWO_ARGUMENTS)


def _check_parametrisation(name: str, cls: type) -> None:
    if not is_dataclass(cls):
        raise ValueError(
            f"{name!r} is no dataclass; put @dataclass(frozen=True, kw_only=True) above it: "
            "networks are compared and exported with its settings"
        )
    _check_call(name, cls, "__call__", ("raw", "key", "at"))
    if hasattr(cls, "inputs"):
        _check_call(name, cls, "inputs", ("at",))


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
    found = _method(cls, method)
    if not callable(found):
        raise ValueError(f"{name!r} needs a method {method}(self, {', '.join(wanted)})")
    if not _accepts(cls, method, wanted):
        raise ValueError(
            f"{name!r} defines {method}{inspect.signature(found)}; "
            f"it must accept {method}(self, {', '.join(wanted)})"
        )


def _accepts(cls: type, method: str, wanted: tuple[str, ...]) -> bool:
    found = _method(cls, method)
    if not callable(found):
        return False
    try:
        inspect.signature(found).bind(None, *wanted)
    except TypeError:
        return False
    return True


def _method(cls: type, name: str) -> Any:
    """As getattr, but for `__call__`, which every class has from its metaclass."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


objectives = Registry("objective", _check_objective)
heads = Registry("head", _check_head)
parametrisations = Registry("parametrisation", _check_parametrisation)
backbones = Registry("backbone")
paths = Registry("path")
time_laws = Registry("time law")
guidance_laws = Registry("guidance law")
couplings = Registry("coupling")
velocities = Registry("velocity estimator")
derivatives = Registry("derivative")
residuals = Registry("residual")
weights = Registry("weight")
teachers = Registry("teacher")
features = Registry("feature map")
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
    parametrisations,
    backbones,
    paths,
    time_laws,
    guidance_laws,
    couplings,
    velocities,
    derivatives,
    residuals,
    weights,
    teachers,
    features,
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
