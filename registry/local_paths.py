"""Paths of files in bindings: a run records whole ones, so that it goes on from every folder.

A part declares which of its parameters are paths in a class attribute:

    local_paths: ClassVar = ("folder",)

A relative path is seen from the current folder. Texts that are no path of anything here, such as a
name on a hub, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config


def anchor(more: Mapping[str, Sequence[str]], value_of: Any) -> None:
    """Bind every relative path that is bound, or was used by default, as a whole one.

    What took effect has the whole path, too: it is what the text that is then written binds.

    `more` has the paths of what is no class, such as {"run": ("start_from",)}. `value_of` replaces
    the macros in a value.
    """
    for (scope, selector), values in (*_bound(), *_used_by_default()):
        for name in (*_paths(selector), *more.get(selector.split(".")[-1], ())):
            if name in values and (whole := _whole(value_of(values[name]))):
                key = f"{scope}/{selector}" if scope else selector
                gin.bind_parameter(f"{key}.{name}", whole)
    for (_, selector), values in config._OPERATIVE_CONFIG.items():
        for name in (*_paths(selector), *more.get(selector.split(".")[-1], ())):
            if name in values and (whole := _whole(value_of(values[name]))):
                values[name] = whole


def _whole(value: Any) -> str:
    """The whole path of a relative one that is here; '' for any other value."""
    if not isinstance(value, str) or not value or Path(value).is_absolute():
        return ""
    return str(Path(value).resolve()) if Path(value).exists() else ""


def _bound() -> tuple[tuple[tuple[str, str], dict[str, Any]], ...]:
    return tuple(config._CONFIG.items())


def _used_by_default() -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """What parts took from their own defaults since gin text was read."""
    for (scope, selector), values in tuple(config._OPERATIVE_CONFIG.items()):
        bound = {
            name
            for (outer, owner), given in config._CONFIG.items()
            if owner == selector and (not outer or f"{scope}/".startswith(f"{outer}/"))
            for name in given
        }
        yield (scope, selector), {k: v for k, v in values.items() if k not in bound}


def _paths(selector: str) -> tuple[str, ...]:
    found = config._REGISTRY.get_match(selector)
    return getattr(found.wrapped, "local_paths", ()) if found else ()
