"""Checks of the single arguments of `run`; their errors name them as gin files do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import registry
from trainers.budget import Budget
from trainers.ema.power_function import exponent

RUN_PARTS = (
    ("backbone", registry.backbones),
    ("dataset", registry.datasets),
    ("sampler", registry.samplers),
    ("engine", registry.engines),
    ("optimizer", registry.optimizers),
    ("schedule", registry.schedules),
    ("metric", registry.metrics),
    ("recorder", registry.recorders),
    ("pruner", registry.pruners),
)


def bound(name: str, part: Any, kind: registry.Registry) -> Any:
    """The part as it was given; ValueError for None, plain values and parts of other kinds."""
    found = registry.kind_of(part)
    if found is not None and found is not kind:
        given = f"= @{found.name_of(part)} is of the kind {found.kind!r}, not {kind.kind!r}"
    elif part is None or isinstance(part, str | int | float | tuple | list | dict):
        given = "is not bound" if part is None else f"= {part!r} is no {kind.kind}"
    else:
        return part
    raise ValueError(
        f"run.{name} {given}. Bind it in the gin file or by --set, for example "
        f"run.{name} = @{kind.names()[0]}{'' if name == 'backbone' else '()'}; "
        f"registered: {', '.join(kind.names())}"
    )


def check_built(given: Mapping[str, Any]) -> None:
    """ValueError if a part was given without brackets, as a class, where it must be built.

    The run builds its backbone and its heads itself, and nothing else.
    """
    for name, part in given.items():
        if name in ("backbone", "heads"):
            continue
        for key, value in _settings(f"run.{name}", part):
            if isinstance(value, type) and (kind := registry.kind_of(value)):
                found = kind.name_of(value)
                raise ValueError(
                    f"{key} = @{found} lacks brackets: write @{found}(), which builds the part"
                )


def _settings(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The value and the fields of the parts in it, at any depth, with their keys in gin."""
    yield key, value
    if isinstance(value, list | tuple):
        for one in value:
            yield from _settings(key, one)
    elif is_dataclass(value) and not isinstance(value, type):
        kind = registry.kind_of(value)
        owner = kind.name_of(value) if kind else key
        for f in fields(value):
            if f.init:
                yield from _settings(f"{owner}.{f.name}", getattr(value, f.name))


def where_to_bind(keys: Iterable[str]) -> str:
    """How to use the parts of these bindings, for the end of an error; '' where nothing is known.

    It knows the parts that a run takes directly.
    """
    parts = dict.fromkeys(key.split("/")[-1].rpartition(".")[0].split(".")[-1] for key in keys)
    found = [(part, *taken) for part in parts for taken in RUN_PARTS if part in taken[1]]
    said = [
        f"The {kind.kind} @{part}() is not in use: to use it, bind run.{argument} = @{part}"
        f"{'' if argument == 'backbone' else '()'}"
        for part, argument, kind in found
    ]
    return "".join(f". {one}" for one in said)


def check_seed(seed: Any) -> None:
    """ValueError unless the seed is a whole number from 0 to 2**32 - 1, as NumPy takes it."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"run.seed = {seed!r} must be a whole number from 0 to {2**32 - 1}")


def check_counts(nfe: Any, **counts: int) -> None:
    """ValueError unless nfe is a tuple and the counts are positive; evaluate_every may be 0."""
    if isinstance(nfe, int):
        raise ValueError(f"run.nfe = {nfe} must be a tuple, such as run.nfe = ({nfe},)")
    if not (isinstance(nfe, tuple | list) and nfe and all(map(_is_count, nfe))):
        raise ValueError(f"run.nfe = {nfe!r} must be a tuple of positive whole numbers")
    for name, count in counts.items():
        if not _is_count(count, 0 if name == "evaluate_every" else 1):
            raise ValueError(f"run.{name} = {count!r} must be a positive whole number")


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def decays(given: float | Sequence[float]) -> tuple[float, ...]:
    """The decays of run.ema_decay; ValueError for one outside [0, 1) and for one given twice."""
    found = tuple(given) if isinstance(given, Sequence) else (given,)
    if not found or len(set(found)) < len(found) or not all(0 <= d < 1 for d in found):
        raise ValueError(
            f"run.ema_decay = {given!r} must be a number in [0, 1), or several different ones"
        )
    return found


def power_widths(widths: Any, snapshots: int) -> tuple[float, ...]:
    """The widths of run.power_emas; ValueError unless run.ema_snapshots is bound with them."""
    given = tuple(widths) if isinstance(widths, Sequence) else (widths,)
    for width in given:
        try:
            exponent(width)
        except (TypeError, ValueError) as error:
            raise ValueError(f"run.power_emas = {widths!r}: {error}") from None
    if len(set(given)) < len(given):
        raise ValueError(f"run.power_emas = {widths!r} must be different widths")
    if not isinstance(snapshots, int) or snapshots < 0 or bool(given) != bool(snapshots):
        raise ValueError(
            f"run.power_emas = {given!r} and run.ema_snapshots = {snapshots!r} need each other: "
            "bind both, such as (0.05, 0.1) and 32, or neither"
        )
    return given


def one_budget(**amounts: Any) -> Budget:
    """The budget from steps, images and seconds; ValueError unless exactly one is given."""
    given = {name: amount for name, amount in amounts.items() if amount is not None}
    if len(given) > 1:
        raise ValueError(
            f"the budget is one of steps, images and seconds; bound are "
            f"{', '.join(f'run.{name} = {amount}' for name, amount in given.items())}. "
            f"Unbind what you do not mean, such as run.{next(iter(given))} = None"
        )
    if not given:
        raise ValueError("no budget is bound; bind one of run.steps, run.images and run.seconds")
    ((name, amount),) = given.items()
    if name != "seconds" and not _is_count(amount):
        raise ValueError(f"run.{name} = {amount!r} must be a positive whole number")
    if name == "seconds" and not (_is_number(amount) and 0 < amount < math.inf):
        raise ValueError(f"run.seconds = {amount!r} must be a positive number")
    return Budget(**given)
