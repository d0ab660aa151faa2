"""Paths of files in bindings: a run records whole ones, so that it goes on from every folder.

A part declares which of its parameters are paths in a class attribute:

    local_paths: ClassVar = ("folder",)

A relative path is seen from the current folder. Texts that are no path of anything here, such as a
name on a hub, stay as they are.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gin
from gin import config

from registry.configuration.gin_bindings import (
    MACRO,
    bindings_of,
    bound,
    declared,
    is_macro,
    without_macros,
)

Entry = tuple[tuple[str, str], dict[str, Any]]  # scope and selector, and the values by parameter


def anchor_paths(more: Mapping[str, Sequence[str]]) -> None:
    """Bind every relative path that is bound, or was used by default, as a whole one.

    What has been used counts as if it had been bound so from the start. `more` has the paths of
    what is no class, such as {"run": ("start_from",)}.
    """
    used = tuple(config._OPERATIVE_CONFIG.items())
    whole_of_used = list(_whole_paths(used, more))  # while their macros can be read
    for (scope, selector), name, whole in _whole_paths((*bound(), *_by_default()), more):
        key = f"{scope}/{selector}" if scope else selector
        gin.bind_parameter(f"{key}.{name}", whole)
    for owner, name, whole in whole_of_used:
        config._OPERATIVE_CONFIG[owner][name] = whole
    if whole_of_used:
        _forget_unread_macros()


def path_macros(more: Mapping[str, Sequence[str]]) -> frozenset[str]:
    """The macros that paths read directly; for `whole_binding`, before `anchor_paths`."""
    return frozenset(
        values[name].config_key[0]
        for key, values in bound()
        for name in _path_parameters(key[1], more)
        if is_macro(values.get(name))
    )


def whole_binding(binding: str, more: Mapping[str, Sequence[str]], macros: Container[str]) -> str:
    """A line of gin text that binds a relative path, or one of these macros, with a whole path."""
    for key, value in bindings_of(binding).items():
        part, _, parameter = key.split("/")[-1].rpartition(".")
        if key in macros or (part and parameter in _path_parameters(part, more)):
            with suppress(ValueError, SyntaxError):  # a reference, such as %DATA
                if whole := _whole(ast.literal_eval(value)):
                    return f"{key} = {whole!r}"
    return binding


def _path_parameters(selector: str, more: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return (*declared(selector, "local_paths"), *more.get(selector.split(".")[-1], ()))


def _whole_paths(
    entries: Iterable[Entry], more: Mapping[str, Sequence[str]]
) -> Iterator[tuple[tuple[str, str], str, str]]:
    """The key and the parameter of each relative path that is here, and the whole path."""
    for key, values in entries:
        for name in _path_parameters(key[1], more):
            if name in values and (whole := _whole(without_macros(values[name]))):
                yield key, name, whole


def _forget_unread_macros() -> None:
    """Keep those used macros that a used value still reads, through other macros or directly."""
    used = config._OPERATIVE_CONFIG
    macros = {key for key in used if key[1] == MACRO}
    read = [used[key] for key in used.keys() - macros]
    for values in read:  # which grows by the values of the macros that are met
        for reference in config.iterate_references(values):
            if reference.config_key in macros:
                macros.remove(reference.config_key)
                read.append(used[reference.config_key])
    for key in macros:
        del used[key]


def _whole(value: Any) -> str:
    """The whole path of a relative one that is here; '' for any other value."""
    if not isinstance(value, str) or not value or Path(value).is_absolute():
        return ""
    return str(Path(value).resolve()) if Path(value).exists() else ""


def _by_default() -> Iterator[Entry]:
    """What parts took from their own defaults since gin text was read."""
    for (scope, selector), values in tuple(config._OPERATIVE_CONFIG.items()):
        given_by_hand = {
            name
            for (outer, owner), given in bound()
            if owner == selector and (not outer or f"{scope}/".startswith(f"{outer}/"))
            for name in given
        }
        yield (scope, selector), {k: v for k, v in values.items() if k not in given_by_hand}
