"""Checks what is bound against what the parameters take, before anything is built.

A parameter says what it takes by its annotation: `int`, `float | None`, `tuple[float, float]`,
`Literal["element", "rms"]`, a contract such as `Optimizer`, or a range of registry/ranges.py. An
annotation of another sort is not checked. The check reads what gin holds, so it is the same for a
file, for `--set`, for an axis of a grid and for the Python door.

A value must also be one that gin can write, because a run is recorded as gin text. gin leaves a
value that it cannot write out of its text without a word; the run would then be repeated, or
trained in another process, with the default.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union

from gin import config

import registry
from registry.configuration.gin_bindings import inside
from registry.core import Registry
from registry.ranges import Range

LARGEST = 2**63 - 1  # of a whole number, as tensors hold it

_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text in quotes",
    types.NoneType: "None",
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a binding; `meant` is the whole number that a float such as 500.0 is."""

    key: str
    text: str
    meant: int | None = None


def problems(bound: Iterable[tuple[str, str, str, Any]]) -> Iterator[Problem]:
    """What is wrong with the bindings.

    A binding is its key, the selector and the parameter that the key names, and its value, with
    macros replaced by theirs.
    """
    for key, selector, parameter, value in bound:
        if problem := _unwritable(key, value):
            yield Problem(key, problem)
            continue
        owner = config._REGISTRY.get_match(selector)
        if owner is None:
            continue
        wanted = _annotations(owner.wrapped).get(parameter)
        if wanted is None or (value is None and _default_is_none(owner.wrapped, parameter)):
            continue
        if expected := _expected(value, wanted):
            hint = _hint(key, value, wanted)
            text = f"{key} = {_shown(value)} must be {expected}.{hint}{_kinds_of_parts(value)}"
            whole = int(value) if isinstance(value, float) and value.is_integer() else None
            fits = whole is not None and not _expected(whole, wanted)
            yield Problem(key, text, whole if fits else None)


def _unwritable(key: str, value: Any) -> str:
    for one in inside(value):
        if isinstance(one, float) and not math.isfinite(one):
            return (
                f"{key} = {_shown(value)}: gin has no text for a number that is not finite, so the "
                "run could not be recorded. Give a finite number, or leave the binding out where "
                "the default is what you mean"
            )
    if config._is_literally_representable(value):
        return ""
    return (
        f"{key} = {_shown(value)} cannot be written as gin text that reads back as the same value, "
        "so the run could not be recorded. Give numbers, texts, tuples, lists, dicts and parts"
    )


@cache
def _annotations(part: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the parameters with which a part is built; those that can be resolved."""
    function: Any = part.__init__ if isinstance(part, type) else part  # type: ignore[misc]
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # any error of any code in an annotation: a name that only a checker imports
        return {}


def _default_is_none(part: Callable[..., Any], parameter: str) -> bool:
    try:
        found = inspect.signature(part).parameters.get(parameter)
    except (TypeError, ValueError):
        return False
    return found is not None and found.default is None


def _expected(value: Any, wanted: Any) -> str:
    """What should have been given, in words; '' if the value fits, or if nothing can be said."""
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        ranges = [r for r in inner[1:] if isinstance(r, Range)]
        expected = _expected(value, inner[0])
        fits = not expected and all(_within(value, r) for r in ranges)
        return "" if fits else " ".join([_words(inner[0]), *(r.words for r in ranges)]).strip()
    if origin in (Union, types.UnionType):
        found = [_expected(value, one) for one in inner]
        return "" if "" in found else _or(found)
    if origin is Literal:
        allowed = any(type(value) is type(one) and value == one for one in inner)
        return "" if allowed else _or([repr(one) for one in inner])
    if isinstance(value, config.ConfigurableReference):
        return _expected_of_reference(value, wanted)
    if wanted in _WORDS:
        return "" if _is(value, wanted) else _words(wanted)
    if kind := _kind_of(wanted):  # a value that is no reference builds no part
        return f"{_a(kind.kind)}, such as @{kind.names()[0]}()" if kind.names() else ""
    sequence = isinstance(origin, type) and issubclass(origin, Sequence)
    return _expected_of_sequence(value, origin, inner) if sequence else ""


def _expected_of_sequence(value: Any, origin: type, inner: tuple[Any, ...]) -> str:
    if not isinstance(value, list | tuple):
        return f"a tuple, such as ({_shown(value)},)"
    if not inner:
        return ""
    if origin is tuple and inner[-1] is not Ellipsis:
        if len(value) != len(inner):
            return f"a tuple of {len(inner)}, each {_or(sorted({_words(i) for i in inner}))}"
        each = list(inner)
    else:
        each = [inner[0]] * len(value)
    found = (_expected(one, wanted) for one, wanted in zip(value, each, strict=True))
    wrong = next(filter(None, found), "")
    return f"a tuple in which each is {wrong}" if wrong else ""


def _expected_of_reference(value: Any, wanted: Any) -> str:
    part = value.configurable.wrapped
    found = registry.kind_of(part) if isinstance(part, type) else None
    if found is None:  # a function of the user's own may return anything
        return ""
    if wanted in _WORDS:
        return _words(wanted)
    origin = typing.get_origin(wanted)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a tuple, such as ({value!r},)"
    kind = _kind_of(wanted)
    if kind is not None:
        return "" if kind is found else f"{_a(kind.kind)}, such as @{kind.names()[0]}()"
    lacking = _lacking(part, wanted)
    return f"something with {', '.join(lacking)}" if lacking else ""


@cache
def _contracts() -> dict[Any, Registry]:
    """The kind of the parts that keep each contract."""
    from registry import protocols  # brings torch, which gin files are read without

    return {
        protocols.Objective: registry.objectives,
        protocols.Path: registry.paths,
        protocols.TimeLaw: registry.time_laws,
        protocols.GuidanceLaw: registry.guidance_laws,
        protocols.Coupling: registry.couplings,
        protocols.Derivative: registry.derivatives,
        protocols.Residual: registry.residuals,
        protocols.Weight: registry.weights,
        protocols.Teacher: registry.teachers,
        protocols.Sampler: registry.samplers,
        protocols.Dataset: registry.datasets,
        protocols.Vae: registry.vaes,
        protocols.Metric: registry.metrics,
        protocols.Extractor: registry.extractors,
        protocols.Engine: registry.engines,
        protocols.Optimizer: registry.optimizers,
        protocols.Schedule: registry.schedules,
        protocols.Recorder: registry.recorders,
        protocols.Launcher: registry.launchers,
        protocols.Pruner: registry.pruners,
    }


def _kind_of(wanted: Any) -> Registry | None:
    return _contracts().get(wanted) if isinstance(wanted, type) else None


def _lacking(part: type, contract: Any) -> list[str]:
    """The methods of a contract of some other sort that the part's class does not have."""
    if not getattr(contract, "_is_protocol", False):
        return []
    methods = [name for name, value in vars(contract).items() if inspect.isfunction(value)]
    public = [name for name in methods if not name.startswith("_")]
    return [f"{name}()" for name in public if not hasattr(part, name)]


def _is(value: Any, wanted: type) -> bool:
    if wanted is bool or isinstance(value, bool):
        return wanted is bool and isinstance(value, bool)
    if wanted is float:
        return isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST)
    if wanted is int:
        return isinstance(value, int) and abs(value) <= LARGEST
    return isinstance(value, wanted)


def _within(value: Any, allowed: Range) -> bool:
    """Whether a number is in the range. What is no number, such as None, was checked before."""
    return isinstance(value, bool) or not isinstance(value, int | float) or value in allowed


def _words(wanted: Any) -> str:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Annotated:
        return " ".join([_words(inner[0]), *(r.words for r in inner[1:] if isinstance(r, Range))])
    if origin in (Union, types.UnionType):
        return _or([_words(one) for one in inner])
    kind = _kind_of(wanted)
    return _WORDS.get(wanted) or (_a(kind.kind) if kind else "a value of its kind")


def _hint(key: str, value: Any, wanted: Any) -> str:
    """How to write what was probably meant."""
    for meant in _meant(value):
        if not _expected(meant, wanted):
            return f" Write {key} = {meant!r}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f" The largest is {LARGEST}"
    return ""


def _kinds_of_parts(value: Any) -> str:
    """What the references in the value are, for the end of an error."""
    found = [r.configurable.wrapped for r in config.iterate_references([value])]
    kinds = {part: registry.kind_of(part) for part in found if isinstance(part, type)}
    said = [f"@{kind.name_of(part)} is {_a(kind.kind)}" for part, kind in kinds.items() if kind]
    return f" {'; '.join(said)}" if said else ""


def _meant(value: Any) -> Iterator[Any]:
    if isinstance(value, str):
        for read in (int, float):
            try:
                yield read(value)
            except ValueError:
                continue
        yield {"true": True, "false": False, "none": None}.get(value.lower(), value)
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    elif isinstance(value, list | tuple) and len(value) == 1:
        yield value[0]


def _or(words: Sequence[str]) -> str:
    different = list(dict.fromkeys(words))
    return f"{', '.join(different[:-1])} or {different[-1]}" if different[1:] else different[0]


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _shown(value: Any, longest: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]} ..."
