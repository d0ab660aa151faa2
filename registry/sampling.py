"""How an objective and a sampler meet: by what the one trains and the other needs.

    velocity         v(x, t) at every t: the output v, or u at r = t
    map              u(x, t, r) at every t and every r < t
    map_to_data      u(x, t, 0) at every t
    map_from_noise   u(x, 1, r) at every r
    even_steps       u(x, t, r) on even grids from t = 1 to r = 0, the single step among them
    law              u(x, 1, 0) alone, and only so far that samples have the law of the data

An objective declares what it trains in `trains`, the best way to sample it first; a sampler what it
needs in `needs`, all of it. Both may also name outputs of the network, such as "v" for a sampler
that reads that output and cannot do with u at r = t. What is trained at every t and r is trained on
all lines and grids in it, so that `map` includes the other maps, and each map includes `law`. None
includes the velocity, which is at r = t.

The map of the equation dx/dt = v is one of many that carry noise to the data. An objective that
names `law` says that any of them is right for it: alone for a one-step generator (Drifting), beside
a map for a method that compares laws at every t and r (IMM). It has no error against the exact map,
and neither has one whose `fixed_point` is the "distribution".

Whatever follows from these words is decided here: which samplers are valid (`missing_for`), which
is the default (zoo/samplers/validity.py, by the first word), and where an error against the exact
flow is defined (`map_is_exact_at`, `has_velocity`).
"""

from __future__ import annotations

import inspect
from typing import Any

from registry.core import did_you_mean

VELOCITY, MAP = "velocity", "map"
TO_DATA, FROM_NOISE, EVEN_STEPS = "map_to_data", "map_from_noise", "even_steps"
LAW = "law"
MAPS = (MAP, TO_DATA, FROM_NOISE, EVEN_STEPS, LAW)  # what is read from the output u
WORDS = (VELOCITY, *MAPS)

_AT = {
    VELOCITY: "the velocity at every t",
    MAP: "the map from every t to every r",
    TO_DATA: "the map from every t to the data alone",
    FROM_NOISE: "the map from the noise to every r",
    EVEN_STEPS: "the map on even grids",
    LAW: "one step from the noise to the data's law",
}
_SAME = 1e-6  # times may be rounded to float32


def trained_by(objective: Any) -> tuple[str, ...]:
    """What the objective trains, best first: `trains`, else what outputs of its names allow.

    `objective` is an object or its class. Without a declaration, an objective of u trains it
    everywhere.
    """
    if isinstance(declared := getattr(objective, "trains", None), tuple):
        return declared
    heads = objective.heads
    words = (MAP, VELOCITY) if "u" in heads else (VELOCITY,) if "v" in heads else ()
    return (*words, *(key for key in heads if key not in ("u", "v")))


def needed_by(sampler: Any) -> tuple[str, ...]:
    """What the sampler, an object or its class, needs: `needs`, else what its `heads` stand for.

    () stands for one that runs another sampler, which says it.
    """
    if declares(sampler, "needs", "heads") != "heads":
        return tuple(getattr(sampler, "needs", ()))
    heads = tuple(sampler.heads)
    if "v" in heads:
        return (VELOCITY,) if "u" in heads else (VELOCITY, "v")
    return tuple(MAP if key == "u" else key for key in heads)


def outputs_for(sampler: Any, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a network's outputs `keys` that the sampler reads; all where it does not say."""
    if not (needs := needed_by(sampler)):
        inner = getattr(sampler, "sampler", None)  # which one with guidance runs
        return keys if inner is None else outputs_for(inner, keys)
    velocity = "v" if "v" in keys else "u"
    read = {velocity if need == VELOCITY else "u" if need in MAPS else need for need in needs}
    return tuple(key for key in keys if key in read)


def missing_for(sampler: Any, objective: Any) -> tuple[str, ...]:
    """What the sampler needs and the objective does not train."""
    trained = {*with_included(trained_by(objective)), *objective.heads}
    return tuple(need for need in needed_by(sampler) if need not in trained)


def with_included(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words, and after them those that they include."""
    included = MAPS if MAP in words else (LAW,) if {*words} & {*MAPS} else ()
    return tuple(dict.fromkeys((*words, *included)))


def map_is_exact_at(objective: Any, t: float, r: float) -> bool:
    """Whether u(x, t, r) is trained as the map itself, so that it has an error against it.

    `trains_step` of the objective, where it declares it, may take steps out.
    """
    words = trained_by(objective)
    laws_alone = LAW in words or getattr(objective, "fixed_point", "") == "distribution"
    if laws_alone or r >= t:
        return False
    size = 1 / (t - r)
    inside = {
        MAP: True,
        TO_DATA: r <= _SAME,
        FROM_NOISE: t >= 1 - _SAME,
        EVEN_STEPS: all(abs(x - round(x)) < _SAME for x in (size, size * t)),
    }
    trains_step = getattr(objective, "trains_step", None)
    reached = trains_step is None or trains_step(t, r)
    return reached and any(inside.get(word, False) for word in words)


def has_velocity(objective: Any) -> bool:
    """Whether the velocity is trained, so that it has an error against the exact one."""
    return VELOCITY in trained_by(objective)


def in_words(names: tuple[str, ...]) -> str:
    """Such as "the velocity at every t, the output 'energy'"."""
    return ", ".join(_AT.get(name, f"the output {name!r}") for name in names)


def declares(part: Any, *attributes: str) -> str:
    """Which of these attributes the part's nearest class declares, "" if no class does.

    Where one class declares several of them, it is the first one that is given.
    """
    classes = (part if isinstance(part, type) else type(part)).__mro__
    found = (a for cls in classes for a in attributes if getattr(cls, a, None) is not None
             and a in vars(cls))  # fmt: skip
    return next(found, "")


def check_needs(name: str, cls: type) -> None:
    """ValueError unless the class of the sampler `name` says what it needs."""
    if declares(cls, "needs", "heads") == "heads":
        return
    needs: Any = getattr(cls, "needs", None)
    wraps = "sampler" in inspect.signature(cls).parameters
    if not _are_names(needs) or not (needs or wraps):
        raise ValueError(
            f"sampler {name!r} declares needs = {needs!r}; it needs a tuple of what it samples "
            f'with, such as needs: ClassVar = ("{VELOCITY}",). There are {", ".join(WORDS)}, and '
            "the outputs of the network by their names"
        )
    for need in needs:
        if need not in WORDS and (hint := did_you_mean(need, WORDS)):
            raise ValueError(f"sampler {name!r} needs {need!r}, which is no word for it.{hint}")


def check_trains(name: str, objective: Any) -> None:
    """ValueError where the objective `name`, or its class, trains what its outputs cannot give."""
    trains, heads = getattr(objective, "trains", ()), objective.heads
    if isinstance(trains, property):  # it depends on fields, which only an object has
        return
    if not _are_names(trains):
        raise ValueError(
            f"objective {name!r} declares trains = {trains!r}; it needs a tuple of what it "
            f'trains, best first, such as trains: ClassVar = ("{MAP}", "{VELOCITY}")'
        )
    for word in trains:
        if word not in (*WORDS, *heads):
            raise ValueError(
                f"objective {name!r} trains {word!r}, which is no word for it."
                f"{did_you_mean(word, WORDS)} There are {', '.join(WORDS)}, and its outputs "
                f"{', '.join(heads)}"
            )
        outputs = {VELOCITY: ("u", "v")}.get(word, ("u",) if word in MAPS else (word,))
        if not {*outputs} & {*heads}:
            raise ValueError(
                f"objective {name!r} trains {word!r} and has the outputs {', '.join(heads)}: "
                f"{_AT[word]} is read from {' or '.join(outputs)}"
            )


def _are_names(found: Any) -> bool:
    return isinstance(found, tuple) and all(isinstance(name, str) for name in found)
