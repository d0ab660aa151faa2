"""Writes Python objects as gin text that builds the same objects again, so a run can record them.

    bindings_of_values({"run.objective": MeanFlow(weight=Adaptive(power=0.5)), "run.steps": 10})
    ["run.objective = @mean_flow()", "mean_flow.weight = @adaptive()", "adaptive.power = 0.5",
     "run.steps = 10"]

A field that has its default is left out. Two parts of one class that differ get scopes, named after
the places where they stand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import registry


def bindings_of_values(values: Mapping[str, Any]) -> list[str]:
    """One binding a line, in the order of the keys and then of the fields.

    A value is plain data, a registered class or an instance of one that is a dataclass, or such in
    tuples, lists and dicts. A text that begins with @ or % is a gin reference. ValueError, with the
    key, for anything else.
    """
    instances = [part for value in values.values() for part in _parts(value)]
    found = []
    for key, value in values.items():
        found += _bindings(key, value, key.split(".")[-1], instances)
    return found


def _bindings(key: str, value: Any, place: str, instances: list[Any]) -> list[str]:
    """`key = value`, then the bindings of the fields of the parts in it."""
    inner: list[str] = []
    text = _text(key, value, place, instances, inner)
    return [f"{key} = {text}", *inner]


def _text(key: str, value: Any, place: str, instances: list[Any], inner: list[str]) -> str:
    if isinstance(value, type):
        return f"@{_name(key, value)}"
    if is_dataclass(value):
        return _reference(key, value, place, instances, inner)
    if isinstance(value, Path):
        return repr(str(value))
    if isinstance(value, str):
        return value if value.startswith(("@", "%")) else repr(value)
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(float(value))  # a NumPy number has a repr that gin cannot read
    if isinstance(value, list | tuple):
        texts = [_text(key, v, f"{place}_{i}", instances, inner) for i, v in enumerate(value, 1)]
        if isinstance(value, list):
            return f"[{', '.join(texts)}]"
        return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
    if isinstance(value, Mapping):
        pairs = (
            f"{_text(key, k, place, instances, inner)}: "
            f"{_text(key, v, f'{place}_{i}', instances, inner)}"
            for i, (k, v) in enumerate(value.items(), 1)
        )
        return f"{{{', '.join(pairs)}}}"
    raise ValueError(
        f"{key} = {value!r} cannot be written as gin text, so the run could not be recorded. Give "
        "numbers, texts, tuples, and parts that are registered"
    )


def _reference(key: str, part: Any, place: str, instances: list[Any], inner: list[str]) -> str:
    name = _name(key, type(part))
    same = [one for one in instances if type(one) is type(part)]
    alone = all(_equal(one, part) for one in same)
    selector = name if alone else f"{place}/{name}"
    for f in fields(part):
        if not f.init:
            continue
        value = getattr(part, f.name)
        if alone and _is_default(f, value):
            continue
        where = f.name if alone else f"{place}/{f.name}"
        inner += [
            line
            for line in _bindings(f"{selector}.{f.name}", value, where, instances)
            if line not in inner
        ]
    return f"@{selector}()"


def _name(key: str, cls: type) -> str:
    for kind in registry.kinds:
        for name in kind.names():
            if kind.get(name) is cls:
                return name
    raise ValueError(
        f"{key}: {cls.__module__}.{cls.__qualname__} is not registered, so the run could not be "
        "recorded. Put the decorator of its kind above it, such as "
        f'@registry.objectives.register("my_{cls.__name__.lower()}")'
    )


def _parts(value: Any) -> Iterator[Any]:
    """The dataclass instances in a value, at any depth."""
    if is_dataclass(value) and not isinstance(value, type):
        yield value
        for f in fields(value):
            if f.init:
                yield from _parts(getattr(value, f.name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _parts(one)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _parts(one)


def _is_default(f: Field[Any], value: Any) -> bool:
    if f.default is not MISSING:
        return _equal(value, f.default)
    return f.default_factory is not MISSING and _equal(value, f.default_factory())


def _equal(one: Any, other: Any) -> bool:
    """Whether gin would build an equal value; dataclasses are compared field by field."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one) and not isinstance(one, type):
        return all(
            _equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one) if f.init
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
