"""Secrets among the bindings: kept out of everything that gin writes, or refused.

A part may say which of its fields take a text with a secret:

    takes_secrets: ClassVar = ("tracking_uri",)

Such a text is bound with `***` in the place of the secret, so that no gin text, param or repr holds
it; the part finds the whole text again by `registry.secrets.revealed`. A secret in any other
binding is refused, because bindings are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gin import config

from registry.secrets import concealed, holds_secret, keep

_MACRO = "gin.macro"


def withdraw_secrets() -> None:
    """Take the secrets out of what is bound; ValueError for a binding that may hold none."""
    taken: set[tuple[str, str, str]] = set()
    for (scope, selector), values in list(config._CONFIG.items()):
        for parameter in _fields(selector) & {*values}:
            taken.add(_withdraw(scope, selector, parameter))
    for (scope, selector), values in config._CONFIG.items():
        for parameter, value in values.items():
            if (scope, selector, parameter) in taken:
                continue
            key = _key(scope, selector, parameter)
            for text in _texts(value):
                if holds_secret(scope if selector == _MACRO else parameter, text):
                    raise ValueError(
                        f"{key} = {concealed(text)!r} holds a password, token or key. Bindings are "
                        "recorded, so a secret may not stand in one: let the part read it from a "
                        "variable of the environment"
                    )


def _withdraw(scope: str, selector: str, parameter: str) -> tuple[str, str, str]:
    """Conceal the text of a field, or of the macro that it reads; returns where the text stood."""
    values = config._CONFIG[scope, selector]
    value = values[parameter]
    if isinstance(value, config.ConfigurableReference) and value.configurable.selector == _MACRO:
        if "value" in config._CONFIG.get(value.config_key, {}):
            named, macro = value.config_key
            return _withdraw(named, macro, "value")
    elif isinstance(value, str):
        values[parameter] = keep(value)
    return scope, selector, parameter


def _fields(selector: str) -> set[str]:
    found = config._REGISTRY.get_match(selector)
    return set(getattr(found.wrapped, "takes_secrets", ())) if found else set()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from _texts(pair)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _key(scope: str, selector: str, parameter: str) -> str:
    if selector == _MACRO:
        return scope
    short = config._REGISTRY.minimal_selector(selector)
    return f"{scope}/{short}.{parameter}" if scope else f"{short}.{parameter}"
