"""Former names of parameters, which go on working for one release.

A part declares the parameters that were renamed in a class attribute, {former name: present name}:

    renamed_parameters: ClassVar = {"clip": "max_grad_norm"}

A binding under a former name then binds the parameter, and a warning gives the present name. The
keys of gin text that an older version recorded are read in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from gin import config

from registry.configuration.gin_files import Reading

log = logging.getLogger(__name__)


def present_name(selector: str, parameter: str) -> str:
    """The present name of a part's parameter, which may be given by a former name."""
    return _renamed(selector).get(parameter, parameter)


def former_name(selector: str, parameter: str) -> str:
    """The former name of a part's parameter, or its name if it was never renamed."""
    return {now: former for former, now in _renamed(selector).items()}.get(parameter, parameter)


@contextmanager
def accepted(reading: Reading) -> Iterator[None]:
    """While it is open, a binding under a former name binds the parameter itself.

    A later text may bind the parameter again, under either name, and wins as usual. But ValueError
    if one text (a file, or the bindings beside the files) binds a parameter under both of its
    names in one scope.
    """
    bind = config.bind_parameter
    written: dict[tuple[str, str, str, str], str] = {}  # the name under which each was bound

    def bind_present(key: tuple[str, str, str], value: Any) -> None:
        scope, selector, name = key
        now, text = present_name(selector, name), reading.place
        found = config._REGISTRY.get_match(selector)
        part = found.selector if found else selector
        first = written.setdefault((text, scope, part, now), name)
        if first != name:
            prefix = f"{scope}/{selector}" if scope else selector
            former = name if first == now else first
            raise ValueError(
                f"{text} binds both {prefix}.{former} and {prefix}.{now}, and they are one "
                f"parameter: {former!r} is its former name. Remove the line with {prefix}.{former}"
            )
        if name != now:
            _warn(text, f"{selector}.{name}", f"{selector}.{now}")
        bind((scope, selector, now), value)

    config.bind_parameter = bind_present
    try:
        yield
    finally:
        config.bind_parameter = bind


@lru_cache  # once for each text: one command reads a file several times
def _warn(text: str, former: str, now: str) -> None:
    log.warning(
        "%s is called %s now; this release still takes the former name, in %s", former, now, text
    )


def _renamed(selector: str) -> Mapping[str, str]:
    found = config._REGISTRY.get_match(selector)
    return getattr(found.wrapped, "renamed_parameters", {}) if found else {}
