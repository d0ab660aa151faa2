"""gin: reading files and bindings, running under an arm, and building what is bound.

An arm is a gin scope, a named bundle of bindings (`mean_flow/run.objective = @mean_flow()`), in
force inside `with arm("mean_flow"):`. After the run's arguments are built nothing reads gin.

gin-config has no public functions for most of this, so we use private ones; its version is pinned.
"""

from __future__ import annotations

import copy
import logging
import threading
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gin
from gin import config, config_parser

from registry.configuration.former_names import accepted
from registry.configuration.gin_bindings import (
    MACRO,
    bound,
    is_macro,
    key_of,
    values_bound,
)
from registry.configuration.gin_bindings import bindings_of as bindings_of
from registry.configuration.gin_bindings import differing_keys as differing_keys
from registry.configuration.gin_bindings import former_key as former_key
from registry.configuration.gin_bindings import full_text as full_text
from registry.configuration.gin_bindings import inert_bindings as inert_bindings
from registry.configuration.gin_bindings import operative_text as operative_text
from registry.configuration.gin_bindings import operative_values as operative_values
from registry.configuration.gin_bindings import overridden_bindings as overridden_bindings
from registry.configuration.gin_bindings import own_key as own_key
from registry.configuration.gin_bindings import query as query
from registry.configuration.gin_bindings import read_macros as read_macros
from registry.configuration.gin_bindings import required as required
from registry.configuration.gin_bindings import scope_bindings as scope_bindings
from registry.configuration.gin_bindings import scopes as scopes
from registry.configuration.gin_errors import collected, explain, explain_syntax
from registry.configuration.gin_files import code_hashes as code_hashes
from registry.configuration.gin_files import import_folders as import_folders
from registry.configuration.gin_files import imported_files as imported_files
from registry.configuration.gin_files import portable as portable
from registry.configuration.gin_files import read_text as read_text
from registry.configuration.gin_files import reader
from registry.configuration.gin_files import resolve as resolve
from registry.configuration.gin_secrets import withdraw_secrets
from registry.configuration.gin_values import Problem, problems
from registry.configuration.local_paths import anchor_paths as anchor_paths
from registry.configuration.local_paths import path_macros as path_macros
from registry.configuration.local_paths import whole_binding as whole_binding
from registry.core import did_you_mean
from registry.plugins import load_plugins
from registry.secrets import forget, kept

_alone = threading.RLock()

log = logging.getLogger(__name__)


def parse(
    files: Sequence[str | Path],
    bindings: Sequence[str] = (),
    troubles: list[str] | None = None,
    *,
    trusted: bool = True,
    recorded: bool = False,
) -> tuple[Path, ...]:
    """Forget every binding, then read the files and the bindings; returns the files read, in order.

    A file may import the Python files next to it (`import my_loss`), unless it came with a folder
    and is not `trusted`: then it may import what is imported already. Where `troubles` is given, it
    gets what is wrong with a binding, and reading goes on without that binding. Files that a run
    has `recorded` keep the values that are refused today, with a warning; 500.0 is read as 500
    where a whole number is wanted.
    """
    load_plugins()
    gin.clear_config()
    paths = [str(resolve(file)) for file in files]
    trouble = nullcontext() if troubles is None else collected(troubles)
    with reader(trusted=trusted) as reading, accepted(reading), trouble:
        try:
            gin.parse_config_files_and_bindings(paths, list(bindings), finalize_config=False)
        except (SyntaxError, tokenize.TokenError) as error:
            raise explain_syntax(error, reading.opened) from None
        except (ValueError, ModuleNotFoundError) as error:
            raise explain(error) from None
    try:
        withdraw_secrets()
        _check_macros(bindings)
    except ValueError as error:
        if troubles is None:
            raise
        troubles.append(str(error))
    else:
        found = list(problems(values_bound()))
        if recorded:
            found = _kept_as_recorded(found, bindings)
        wrong = [problem.text for problem in found]
        if wrong and troubles is None:
            raise ValueError("\n".join(wrong))
        if troubles is not None:
            troubles += wrong
    return tuple(dict.fromkeys(reading.opened))


@contextmanager
def isolated() -> Iterator[None]:
    """Nothing is bound inside and no scope is open; afterwards gin is as it was before.

    gin's configuration is one for the whole process: a second thread waits here.
    """
    stores: tuple[Any, ...] = (
        config._CONFIG,
        config._SINGLETONS,
        config._IMPORTS,
        config._OPERATIVE_CONFIG,
    )
    with _alone:
        copies, secrets = [store.copy() for store in stores], kept()
        locked = gin.config_is_locked()
        gin.clear_config()
        try:
            with gin.config_scope(None):
                yield
        finally:
            for store, before in zip(stores, copies, strict=True):
                store.clear()
                store.update(before)
            forget(secrets)
            config._set_config_is_locked(locked)


@contextmanager
def arm(name: str = "") -> Iterator[None]:
    """Run under the bindings of an arm; '' means the plain bindings."""
    if name and name not in arms():
        raise ValueError(
            f"no arm named {name!r}.{did_you_mean(name, arms())} {_several(name)}"
            f"Arms: {', '.join(arms()) or 'none; these files have no arms'}"
        )
    if missing := required(name):
        raise ValueError(
            f"the gin files require a value for {', '.join(missing)}; add a line such as "
            f"{missing[0]} = ..."
        )
    with gin.config_scope(name):
        yield


def arms() -> tuple[str, ...]:
    """The arms in `Grid.arms`; where that is not bound, every scope that holds bindings."""
    declared = query("Grid.arms")
    scopes = (scope.split("/")[0] for (scope, selector), _ in bound() if selector != MACRO)
    return tuple(declared if declared is not None else dict.fromkeys(s for s in scopes if s))


def unbind(key: str) -> None:
    """Forget what is bound to a key such as 'run.dataset', inside and outside of every arm.

    gin builds what is bound even where a caller gives the parameter.
    """
    _, selector, parameter = config_parser.parse_binding_key(key)
    owner = config._REGISTRY.get_match(selector)
    for (_, bound_to), values in bound():
        if owner and bound_to == owner.selector:
            values.pop(parameter, None)


def build(key: str, scope: str = "") -> Any:
    """Build what is bound to a key such as 'run.recorder'; None if nothing is.

    A binding in the scope wins over a binding outside of it.
    """
    outside = query(key)
    with gin.config_scope(scope):
        # gin's own way to build the references inside a value.
        return copy.deepcopy(query(f"{scope}/{key}", outside) if scope else outside)


def _kept_as_recorded(found: Sequence[Problem], bindings: Sequence[str]) -> list[Problem]:
    """The problems of what is bound beside the files; a warning of each other one.

    A macro beside the files may be read anywhere, so that all problems count then.
    """
    beside = {own_key(key) for key in bindings_of("\n".join(bindings))}
    if any("." not in key for key in beside):
        return [*found]
    for problem in found:
        if problem.key in beside:
            continue
        read_as = "as it was recorded"
        if problem.meant is not None:
            gin.bind_parameter(problem.key, problem.meant)
            read_as = f"as {problem.meant}"
        log.warning("a new run is refused: %s. This one is read %s", problem.text, read_as)
    return [problem for problem in found if problem.key in beside]


def _several(name: str) -> str:
    return "Give --arm again for each of several arms. " if "," in name else ""


def _check_reference(key: str, part: Any) -> None:
    """ValueError for a function of gin's own, which would be taken for a part of ours."""
    if part.module == "gin" and part.selector not in (MACRO, "gin.singleton"):
        known = [c.name for _, c in config._REGISTRY.items() if c.module != "gin"]
        raise ValueError(
            f"{key} = @{part.name}(): {part.name!r} is a function of gin, and no part."
            f"{did_you_mean(part.name, known)} `objective-zoo list` prints all parts"
        )


def _check_macros(bindings: Sequence[str]) -> None:
    """ValueError for a macro that is read and not set, and for one that nothing reads.

    The second is for macros that are set by hand or under an arm: files may set more than is read.
    """
    macros = [scope for (scope, selector), _ in bound() if selector == MACRO]
    read = set()
    for (scope, selector), values in bound():
        for parameter, value in values.items():
            for reference in filter(is_macro, config.iterate_references([value])):
                macro = reference.config_key[0]
                read.add(macro)
                if macro not in macros:
                    raise ValueError(
                        f"{key_of(scope, selector, parameter)} reads the macro %{macro}, which is "
                        f"not set.{did_you_mean(macro, macros)} Add a line such as {macro} = 1"
                    )
            for reference in config.iterate_references([value]):
                if not reference.config_key[0]:  # %NAME is such a reference, scoped by its name
                    _check_reference(key_of(scope, selector, parameter), reference.configurable)
    by_hand = bindings_of("\n".join(bindings))
    for macro in macros:
        if macro in read or not (macro in by_hand or "/" in macro):
            continue
        scoped = "Macros know no arms; bind the parameter itself. " if "/" in macro else ""
        raise ValueError(
            f"nothing reads the macro {macro!r}. {scoped}"
            f"Macros that are read: {', '.join(sorted(read)) or 'none'}."
            f"{did_you_mean(macro.split('/')[-1], read)}"
        )
