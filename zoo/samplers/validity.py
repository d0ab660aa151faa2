"""Which samplers are valid for an objective: those that need no more than it trains."""

from __future__ import annotations

import dataclasses
import logging
from functools import cache
from typing import Any

from registry import objectives, paths, samplers
from registry.sampling import (
    EVEN_STEPS,
    LAW,
    MAP,
    TO_DATA,
    VELOCITY,
    check_trains,
    declares,
    in_words,
    missing_for,
    needed_by,
    trained_by,
    with_included,
)

# The default, by what an objective trains: no sampler that somebody registers may change it.
DEFAULTS = {
    MAP: "flow_map",
    EVEN_STEPS: "flow_map",
    TO_DATA: "restart",
    VELOCITY: "euler",
    LAW: "one_step",
}

log = logging.getLogger(__name__)


def valid_samplers(objective: Any) -> tuple[str, ...]:
    """The registered samplers that need no more than the objective trains; the first is its own.

    The others follow in the order in which it declares what it trains. An objective that lists
    `samplers`, as those of earlier versions did, has these.
    """
    if (listed := _listed(objective)) is not None:
        return listed
    trained, first = trained_by(objective), _first(objective)

    def place(name: str) -> tuple[bool, int, str]:
        need = needed_by(samplers.get(name))[0]
        need = need if need in trained else MAP  # which includes the other maps
        return name != first, trained.index(need) if need in trained else 0, name

    fit = [name for name in samplers.names() if needed_by(samplers.get(name))]
    return tuple(sorted((n for n in fit if not _missing(samplers.get(n), objective)), key=place))


def default_sampler(name: str, objective: Any) -> str:
    """The sampler of the objective `name` where none is bound; ValueError if nothing decides it.

    The first word of `trains` decides, or the first of the samplers that the objective lists. For
    an objective of other outputs than u and v it is the only one that fits.
    """
    fit = valid_samplers(objective)
    if not fit:
        raise ValueError(f"no registered sampler reads the outputs of objective {name!r}")
    if _listed(objective) is None and not _first(objective) and len(fit) > 1:
        raise ValueError(
            f"several samplers fit objective {name!r}, {', '.join(fit)}, and none of the words of "
            f"its `trains` says which comes first. Bind run.sampler = @{fit[0]}(), or another one"
        )
    return fit[0]


def on_path_of(objective: Any, sampler: Any) -> Any:
    """The sampler, or the one inside it, on the objective's path where it names no path."""
    changes: dict[str, Any] = {}
    path, inner = getattr(objective, "path", None), getattr(sampler, "sampler", None)
    if path is not None and getattr(sampler, "path", path) is None:
        changes["path"] = path
    if inner is not None and (followed := on_path_of(objective, inner)) is not inner:
        changes["sampler"] = followed
    return dataclasses.replace(sampler, **changes) if changes else sampler


def check_sampler(name: str, objective: Any, sampler: Any) -> None:
    """ValueError unless the sampler is valid for the objective `name` and uses the same path."""
    inner = getattr(sampler, "sampler", None)
    if inner is not None and not needed_by(sampler):
        return check_sampler(name, objective, inner)
    check_trains(name, objective)
    chosen, listed = samplers.name_of(sampler), _listed(objective)
    missing = _missing(sampler, objective) if listed is None else ()
    if missing or (listed is not None and chosen not in listed):
        why = (
            f"it needs {in_words(missing)}, and the objective trains "
            f"{in_words(trained_by(objective)) or 'nothing that a sampler reads'}"
            if missing
            else "the objective lists its samplers. Where it trains what this one needs, let it "
            f"declare trains = {needed_by(sampler)} instead of `samplers`"
        )
        fit = valid_samplers(objective)
        remedy = f"Bind run.sampler = @{fit[0]}()" if fit else "Register a sampler that fits"
        raise ValueError(
            f"objective {name!r} cannot use sampler {chosen!r}: {why}. Registered samplers that "
            f"fit: {', '.join(fit) or 'none'}. {remedy}"
        )
    path, own = getattr(objective, "path", None), getattr(sampler, "path", None)
    if path is not None and own is not None and own != path:
        raise ValueError(
            f"sampler {chosen!r} adds noise along {own}, but objective {name!r} trains on {path}. "
            f"Leave {chosen}.path unbound, or bind {chosen}.path = @{paths.name_of(path)}()"
        )


def _first(objective: Any) -> str:
    """The default sampler by what the objective trains; "" where none of the words names one."""
    words = with_included(trained_by(objective))
    return next((DEFAULTS[word] for word in words if word in DEFAULTS), "")


def _missing(sampler: Any, objective: Any) -> tuple[str, ...]:
    if declares(sampler, "needs", "heads") == "heads":
        _say_needs(sampler if isinstance(sampler, type) else type(sampler))
    return missing_for(sampler, objective)


def _listed(objective: Any) -> tuple[str, ...] | None:
    """The names in `samplers` of an objective of an earlier version, and a warning of it."""
    if declares(objective, "trains", "samplers") != "samplers":
        return None
    listed = tuple(objective.samplers)
    _say_trains(objective if isinstance(objective, type) else type(objective), listed)
    return listed


@cache
def _say_trains(cls: type, listed: tuple[str, ...]) -> None:
    known = (samplers.get(name) for name in listed if name in samplers)
    needs = dict.fromkeys(need for sampler in known for need in needed_by(sampler))
    log.warning(
        "objective %s lists samplers = %s, which goes on working in this release alone. Let it "
        "declare what it trains, such as trains = %s: every sampler that needs no more is valid",
        *(_name(objectives, cls), listed, tuple(needs)),
    )


@cache
def _say_needs(cls: type) -> None:
    log.warning(
        "sampler %s declares heads, which goes on working in this release alone. Let it declare "
        "needs = %s",
        *(_name(samplers, cls), needed_by(cls)),
    )


def _name(registry: Any, cls: type) -> str:
    return repr(registry.name_of(cls)) if registry.holds(cls) else cls.__name__
