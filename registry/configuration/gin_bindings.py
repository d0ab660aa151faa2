"""What is bound in gin, and what took effect: keys, values and texts.

A key is 'part.parameter' in its shortest spelling, with 'scope/' before it in a scope; a macro's
is its name. gin-config has no public functions for most of this, so we use private ones; its
version is pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from decimal import Decimal, InvalidOperation
from typing import Any

import gin
from gin import config, config_parser

from registry.configuration.former_names import former_name, present_name
from registry.configuration.gin_files import Verbatim

MACRO = "gin.macro"


def required(name: str = "") -> tuple[str, ...]:
    """The keys for which an arm still needs a value: bound to %gin.REQUIRED."""
    effective = {}
    for scope in _enclosing(name):
        for (bound_in, selector), values in bound():
            if bound_in == scope or selector == MACRO:
                for parameter, value in values.items():
                    macro = bound_in if selector == MACRO else ""
                    effective[macro, selector, parameter] = repr(value)
    return tuple(key_of(*key) for key, value in effective.items() if value == "%gin.REQUIRED")


def query(key: str, default: Any = None) -> Any:
    """The value bound to a key such as 'Grid.axes', or the default.

    Macros are replaced by their values; references are kept, and their repr is legal gin.
    """
    scope, selector, parameter = config_parser.parse_binding_key(key)
    owner = config._REGISTRY.get_match(selector)
    found = config._CONFIG.get((scope, owner.selector), {}) if owner else {}
    name = present_name(selector, parameter)
    return without_macros(found[name]) if name in found else default


def scopes() -> set[str]:
    """Every scope that holds bindings."""
    return {scope for (scope, selector), _ in bound() if scope and selector != MACRO}


def scope_bindings(name: str) -> dict[str, str]:
    """What an arm binds, without its name: {'run.objective': '@mean_flow()'}."""
    return {
        key_of("", selector, parameter): repr(value)
        for (scope, selector), values in bound()
        for parameter, value in values.items()
        if scope == name and selector != MACRO
    }


def overridden_bindings(name: str) -> tuple[str, ...]:
    """The plain keys for which an arm has a value of its own."""
    own = scope_bindings(name) if name else {}
    return tuple(key for key in scope_bindings("") if key in own)


def full_text() -> str:
    """All that is bound, files and bindings merged, as gin text."""
    return str(gin.config_str(max_line_length=100))


def operative_text() -> str:
    """What has been used since `parse`, defaults of the parts included, as gin text."""
    return str(gin.operative_config_str(max_line_length=100))


def operative_values() -> dict[str, str]:
    """What has been used since `parse`, by key: macros replaced by their values, in order."""
    found = {
        key_of(scope, selector, parameter): repr(without_macros(value))
        for (scope, selector), values in config._OPERATIVE_CONFIG.items()
        for parameter, value in values.items()
        if selector != MACRO and config._is_literally_representable(value)
    }
    return dict(sorted(found.items()))


def bindings_of(text: str) -> dict[str, str]:
    """The bindings of a gin text by key, in order: {'mean_flow/run.seed': '2'}.

    A parameter that the text calls by a former name has its present name.
    """
    found = {}
    for statement in config_parser.ConfigParser(text, Verbatim()):
        if isinstance(statement, config_parser.BindingStatement):
            scope, selector, parameter, value, _ = statement
            key = f"{scope}/{selector}" if scope else selector
            name = present_name(selector, parameter)
            found[f"{key}.{name}" if name else key] = repr(value)
    return found


def differing_keys(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The keys that two results of `bindings_of` bind differently; 500.0 and 500 are equal.

    A macro that one of them alone reads is left out: the other one binds its value directly, and
    the values are compared where they are used.
    """
    return [
        key
        for key in sorted({**ours, **theirs})
        if not _equal(ours.get(key), theirs.get(key))
        and ("." in key or (key in ours and key in theirs))
    ]


def _equal(one: str | None, other: str | None) -> bool:
    if one == other or one is None or other is None:
        return one == other
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:  # no numbers
        return False


def read_macros() -> set[str]:
    """The macros that have been read since `parse`."""
    return {scope for scope, selector in config._OPERATIVE_CONFIG if selector == MACRO}


def inert_bindings(name: str = "", ignore: Sequence[str] = ("Grid",)) -> tuple[str, ...]:
    """The keys that nothing has used since `parse`, for a run in this arm.

    A binding that a more specific one overrides is not inert. Macros and the bindings of other
    arms are left out.
    """
    used = set()
    for (scope, selector), values in config._OPERATIVE_CONFIG.items():
        used |= {(outer, selector, p) for outer in _enclosing(scope) for p in values}
    others = set(query("Grid.arms", ())) - {name}
    return tuple(
        key_of(scope, selector, parameter)
        for (scope, selector), values in bound()
        if selector != MACRO and scope.split("/")[0] not in others
        if config._REGISTRY.minimal_selector(selector) not in ignore
        for parameter in values
        if (scope, selector, parameter) not in used
    )


def bound() -> Iterable[tuple[tuple[str, str], dict[str, Any]]]:
    """((scope, full selector), {parameter: value}); a macro is a scope with the selector MACRO."""
    return tuple(config._CONFIG.items())


def values_bound() -> Iterator[tuple[str, str, str, Any]]:
    """Every binding: its key, selector, parameter and value, with macros replaced by theirs."""
    for (scope, selector), values in bound():
        for parameter, value in values.items():
            key = key_of(scope, selector, parameter)
            if not repr(value) == "%gin.REQUIRED":
                yield key, selector, parameter, without_macros(value)


def own_key(key: str) -> str:
    """The key as the other functions here give it: in its shortest spelling, with the present name.

    That is 'dumo.path' for 'objective.dumo.path'.
    """
    return _respelt(key, present_name)


def former_key(key: str) -> str:
    """The key as `own_key` gave it before its parameter was renamed."""
    return _respelt(key, former_name)


def _respelt(key: str, name: Callable[[str, str], str]) -> str:
    if "." not in key:
        return key
    scope, selector, parameter = config_parser.parse_binding_key(key)
    owner = config._REGISTRY.get_match(selector)
    return key_of(scope, owner.selector, name(selector, parameter)) if owner else key


def key_of(scope: str, selector: str, parameter: str) -> str:
    if selector == MACRO:
        return scope
    short = config._REGISTRY.minimal_selector(selector)
    return f"{scope}/{short}.{parameter}" if scope else f"{short}.{parameter}"


def _enclosing(scope: str) -> list[str]:
    """'a/b' -> ['', 'a', 'a/b']: where gin looks for bindings, the last one wins."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def declared(selector: str, attribute: str) -> tuple[str, ...]:
    """What the part of a selector declares in a class attribute, such as names; () for nothing."""
    found = config._REGISTRY.get_match(selector)
    return tuple(getattr(found.wrapped, attribute, ())) if found else ()


def inside(value: Any) -> Iterator[Any]:
    """The value and everything in it, at any depth."""
    yield value
    if isinstance(value, Mapping):
        for pair in value.items():
            yield from inside(pair)
    elif isinstance(value, list | tuple | AbstractSet):
        for one in value:
            yield from inside(one)


def is_macro(value: object) -> bool:
    return isinstance(value, config.ConfigurableReference) and value.configurable.selector == MACRO


def without_macros(value: Any) -> Any:
    if is_macro(value):
        bound = config._CONFIG.get(value.config_key, {})
        if "value" not in bound:
            name = value.config_key[0]
            raise ValueError(
                f"the macro %{name} is read, and it is not set. Add a line such as {name} = 1"
            )
        return without_macros(bound["value"])
    if isinstance(value, Mapping):
        return {without_macros(k): without_macros(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_macros(v) for v in value)
    return value
