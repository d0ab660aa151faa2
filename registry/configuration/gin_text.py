"""Writes Python objects as gin text that builds the same objects again, so a run can record them.

    bindings_of_values({"run.objective": MeanFlow(weight=Adaptive(power=0.5)), "run.steps": 10})
    ["run.objective = @mean_flow()", "mean_flow.weight = @adaptive()", "adaptive.power = 0.5",
     "run.steps = 10"]

A field that has its default is left out. Where other bindings could reach an instance, and where
two instances of one class differ, every field is written, under a scope that is named after the
place where the instance stands. What is built is therefore equal to what was given, with one
exception: gin has no text for infinity, so a field whose default is infinite is left out, and a
binding of a file for this field still reaches the instance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import registry

_KEY = re.compile(r"(\w+/)*(\w+\.)*\w+")
_REFERENCE = re.compile(r"@[\w./]+(\(\))?|%[\w.]+")


def bindings_of_values(values: Mapping[str, Any], *, beside_file: bool = False) -> list[str]:
    """One binding a line, in the order of the keys and then of the fields.

    A value is plain data, a registered class, or an instance of a registered dataclass; tuples,
    lists and dicts may hold such values. A text that begins with @ or % is a gin reference. Any
    other value raises a ValueError that names its key. `beside_file` says that a gin file is read
    before these bindings.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f'{values!r} must be a dict of bindings, such as {{"run.steps": 50}}')
    for key in values:
        if not (isinstance(key, str) and _KEY.fullmatch(key)):
            raise ValueError(
                f"{key!r} is not the name of a binding; names are like 'run.steps' or "
                "'mean_flow/run.steps'"
            )
    plain = set() if beside_file else _plain_classes(values)
    return [line for key, value in values.items() for line in _bindings(key, value, plain)]


def _plain_classes(values: Mapping[str, Any]) -> set[type]:
    """The classes whose instances are all equal, and for which nothing else is bound."""
    first: dict[type, Any] = {}
    different = set()
    for value in values.values():
        for part in _parts(value):
            if not _equal(first.setdefault(type(part), part), part):
                different.add(type(part))
    selectors = {key.split("/")[-1].rpartition(".")[0].split(".")[-1] for key in values}
    bound = {kind.get(name) for kind in registry.kinds for name in selectors if name in kind}
    return {*first} - different - bound


def _bindings(key: str, value: Any, plain: set[type]) -> list[str]:
    """`key = value`, then the bindings of the fields of the parts in it."""
    inner: list[str] = []
    place = re.sub(r"(^|/)run\.", r"\1", key).replace(".", "/")
    text = _text(key, value, place, plain, inner)
    return [f"{key} = {text}", *inner]


def _text(key: str, value: Any, place: str, plain: set[type], inner: list[str]) -> str:
    if isinstance(value, type):
        return f"@{_name(key, value)}"
    if is_dataclass(value):
        return _reference(key, value, place, plain, inner)
    if isinstance(value, str | Path):
        return _string(key, str(value))
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, Integral):
        return repr(int(value))  # a NumPy number has a repr that gin cannot read
    if isinstance(value, Real) and math.isfinite(value):
        return repr(float(value))
    if isinstance(value, list | tuple):
        texts = [_text(key, v, f"{place}_{i}", plain, inner) for i, v in enumerate(value, 1)]
        if isinstance(value, list):
            return f"[{', '.join(texts)}]"
        return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"
    if isinstance(value, Mapping):
        pairs = (
            f"{_text(key, k, place, plain, inner)}: {_text(key, v, f'{place}_{i}', plain, inner)}"
            for i, (k, v) in enumerate(value.items(), 1)
        )
        return f"{{{', '.join(pairs)}}}"
    raise ValueError(
        f"{key} = {value!r} cannot be written as gin text, so the run could not be recorded. Give "
        "numbers, texts, tuples, and parts that are registered"
    )


def _string(key: str, value: str) -> str:
    if not value.startswith(("@", "%")):
        return repr(value)
    if not _REFERENCE.fullmatch(value):
        raise ValueError(
            f"{key} = {value!r} begins like a gin reference and is none; references are like "
            "'@dumo()', '@weight/adaptive()' or '%STEPS'"
        )
    return value


def _reference(key: str, part: Any, place: str, plain: set[type], inner: list[str]) -> str:
    name = _name(key, type(part))
    alone = type(part) in plain
    selector = name if alone else f"{place}/{name}"
    for f in fields(part):
        if not f.init:
            continue
        value = getattr(part, f.name)
        # An infinite default is left out in every case, since gin has no text for it.
        infinite = isinstance(value, float) and math.isinf(value)
        if not ((alone or infinite) and _is_default(f, value)):
            lines = _bindings(f"{selector}.{f.name}", value, plain)
            inner += [line for line in lines if line not in inner]
    return f"@{selector}()"


def _name(key: str, cls: type) -> str:
    if (owner := registry.kind_of(cls)) and owner.holds(cls):
        return owner.name_of(cls)
    for kind in registry.kinds:
        for name in kind.names():
            known = kind.get(name)
            if (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"{key}: this {cls.__qualname__} is older than the class that is registered "
                    f"as {name!r} now, because the definition was run again. Make the object again"
                )
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
