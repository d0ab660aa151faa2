"""Turns gin's errors into ones that tell the person who wrote the file what to do."""

from __future__ import annotations

import inspect
import re
import shlex
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gin import config

from registry.core import did_you_mean

_UNKNOWN = re.compile(r"No configurable matching (?:reference )?'(@?)([\w./]+)(?:\(\))?'\.")
_NO_PARAMETER = re.compile(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'\.")
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
_NO_VALUE = re.compile(r"Failed to parse token '(.*)'", re.DOTALL)
_NOT_GIVEN = re.compile(
    r"missing \d+ required .*arguments?: '(\w+)'.*In call to configurable '([\w.]+)'", re.DOTALL
)


# What gin adds to the text of an error that a part raises while it is built.
_IN_CALL = re.compile(
    r"\s*In call to configurable '([\w./]+)' \(<.*?>\)(?: in scope '([\w./]*)')?", re.DOTALL
)
_ADDRESS = re.compile(r"<([\w.]+) ([\w.<>]+) at 0x[0-9a-f]+>")
_UNQUOTED = re.compile(r"([\w./]+)\s*=\s*([^\s='\"@%\[({].*)\Z")


def explain(error: ValueError | ModuleNotFoundError) -> ValueError | ModuleNotFoundError:
    """An error that says what exists and what to do; other errors of gin stay as they are."""
    text = str(error)
    if match := _UNKNOWN.match(text):
        name = match[2]
        known = [c.name for _, c in config._REGISTRY.items() if c.module != "gin"]
        return ValueError(
            f"no part named {name!r}.{did_you_mean(name, known)} `objective-zoo list` prints all; "
            f"for a part of your own, import its module first.{text[match.end() :]}"
        )
    if match := _NO_PARAMETER.match(text):
        selector, parameter = match.groups()
        known = list(inspect.signature(config._REGISTRY.get_match(selector).wrapped).parameters)
        return ValueError(
            f"{selector} has no parameter {parameter!r}.{did_you_mean(parameter, known)} "
            f"It has: {', '.join(known) or 'none'}.{text[match.end() :]}"
        )
    if (match := _NO_MODULE.match(text)) and f"import {match[1].split('.')[0]}" in text:
        return ModuleNotFoundError(
            f"{text}\nA gin file imports modules that lie next to it or that are installed.",
            name=match[1],
        )
    return error


@contextmanager
def collected(troubles: list[str]) -> Iterator[None]:
    """While it is open, gin skips bindings that it cannot make; `troubles` gets the reasons."""
    bind, refer = config.bind_parameter, config.ParserDelegate.configurable_reference
    unknown: list[ValueError] = []  # one for each unknown reference of the binding being read

    def refer_or_note(self: Any, name: str, evaluate: bool) -> Any:
        try:
            return refer(self, name, evaluate)
        except ValueError as error:
            unknown.append(error)
            return None

    def bind_or_note(key: tuple[str, str, str], value: Any) -> None:
        try:
            if unknown:
                raise unknown[0]
            bind(key, value)
        except ValueError as error:
            scope, selector, parameter = key
            where = f"{scope}/{selector}" if scope else selector
            troubles.append(f"{where}.{parameter}: {explain(error)}")
        unknown.clear()

    config.bind_parameter, config.ParserDelegate.configurable_reference = (
        bind_or_note,
        refer_or_note,
    )
    try:
        yield
    finally:
        config.bind_parameter, config.ParserDelegate.configurable_reference = bind, refer


def message_of(error: BaseException) -> str:
    """The error as one line for the user.

    If the user can mend it, the line is the text of the error; else the type stands before it.
    Names of Python stand in it without their addresses.
    """
    return _ADDRESS.sub(r"\1 \2", _IN_CALL.sub(_while_building, _text_of(error)))


def _while_building(match: re.Match[str]) -> str:
    where = f" in {match[2]}" if match[2] else ""
    return f"\n  while {match[1].rsplit('.')[-1]!r} was built{where}"


def _text_of(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"its code asked Python to exit, with {error.code!r}; raise an error there instead"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() would quote it
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error)
    if isinstance(error, TypeError) and (match := _NOT_GIVEN.search(str(error))):
        parameter, name = match.groups()
        return (
            f"@{name}() cannot be built: {parameter!r} is not bound. Write @{name} without "
            "brackets where the run builds it itself (run.backbone, run.heads); else bind "
            f"{name}.{parameter}"
        )
    return f"{type(error).__name__}: {error}"


def explain_syntax(
    error: SyntaxError | tokenize.TokenError, opened: Sequence[Path]
) -> ValueError | SyntaxError:
    """A ValueError that names the place in the gin text.

    A syntax error in a Python file is returned as it is.
    """
    if not isinstance(error, SyntaxError):
        where = opened[-1] if opened else "the bindings"
        return ValueError(f"{where}: a bracket or a quote is not closed ({error.args[0]})")
    if str(error.filename).endswith(".py"):
        return error
    where = f"{error.filename or 'bindings'}, line {error.lineno}: {str(error.text).strip()}"
    if match := _NO_VALUE.search(error.msg):
        value = match[1]
        return ValueError(
            f"cannot read the value {value}. A text needs quotes ({value!r}), a part an @ and, "
            f"to be built, brackets (@{value}())\n  In {where}"
        )
    hint = ""
    if match := _UNQUOTED.match(str(error.text).strip()):
        key, value = match.groups()
        text = f"{key} = {value!r}"
        word = shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
        hint = f"\n  A text needs quotes: {text}\n  In a shell: --set {word}"
    return ValueError(f"this is not gin: {error.msg}\n  In {where}{hint}")
