"""Secrets among the bindings: kept out of everything that gin writes, or refused.

A part may say which of its fields take a text with a secret:

    takes_secrets: ClassVar = ("tracking_uri",)

Such a text is bound with `***` in the place of the secret, so that no gin text, param or repr holds
it; the part finds the whole text again by `registry.secrets.revealed`. A secret in any other
binding is refused, because bindings are recorded.
"""

from __future__ import annotations

from gin import config

from registry.configuration.gin_bindings import MACRO, bound, declared, inside, is_macro, key_of
from registry.secrets import concealed, holds_secret, keep


def withdraw_secrets() -> None:
    """Take the secrets out of what is bound; ValueError for a binding that may hold none."""
    taken: set[tuple[str, str, str]] = set()
    for (scope, selector), values in bound():
        for parameter in {*declared(selector, "takes_secrets")} & {*values}:
            taken.add(_withdraw(scope, selector, parameter))
    for (scope, selector), values in bound():
        for parameter, value in values.items():
            if (scope, selector, parameter) in taken:
                continue
            key = key_of(scope, selector, parameter)
            for text in (one for one in inside(value) if isinstance(one, str)):
                if holds_secret(scope if selector == MACRO else parameter, text):
                    raise ValueError(
                        f"{key} = {concealed(text)!r} holds a password, token or key. Bindings are "
                        "recorded, so a secret may not stand in one: let the part read it from a "
                        "variable of the environment"
                    )


def _withdraw(scope: str, selector: str, parameter: str) -> tuple[str, str, str]:
    """Conceal the text of a field, or of the macro that it reads; returns where the text stood."""
    values = config._CONFIG[scope, selector]
    value = values[parameter]
    if is_macro(value):
        if "value" in config._CONFIG.get(value.config_key, {}):
            named, macro = value.config_key
            return _withdraw(named, macro, "value")
    elif isinstance(value, str):
        values[parameter] = keep(value)
    return scope, selector, parameter
