"""gin: reading files and bindings, running under an arm, and which bindings took effect.

An arm is a gin scope, a named bundle of bindings (`mean_flow/run.objective = @mean_flow()`), in
force inside `with arm("mean_flow"):`. After the run's arguments are built nothing reads gin.

gin-config has no public functions for most of this, so we use private ones; its version is pinned.
"""

from __future__ import annotations

import copy
import threading
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gin
from gin import config, config_parser

from registry.configuration import local_paths
from registry.configuration.former_names import accepted, former_name, present_name
from registry.configuration.gin_errors import collected, explain, explain_syntax
from registry.configuration.gin_files import Verbatim, reader
from registry.configuration.gin_files import code_hashes as code_hashes
from registry.configuration.gin_files import import_folders as import_folders
from registry.configuration.gin_files import imported_files as imported_files
from registry.configuration.gin_files import portable as portable
from registry.configuration.gin_files import read_text as read_text
from registry.configuration.gin_files import resolve as resolve
from registry.configuration.gin_secrets import withdraw_secrets
from registry.configuration.gin_values import problems
from registry.core import did_you_mean
from registry.plugins import load_plugins
from registry.secrets import forget, kept

MACRO = "gin.macro"
_alone = threading.RLock()


def parse(
    files: Sequence[str | Path],
    bindings: Sequence[str] = (),
    troubles: list[str] | None = None,
    *,
    trusted: bool = True,
) -> tuple[Path, ...]:
    """Forget every binding, then read the files and the bindings; returns the files read, in order.

    A file may import the Python files next to it (`import my_loss`), unless it came with a folder
    and is not `trusted`: then it may import what is imported already. Where `troubles` is given, it
    gets what is wrong with a binding, and reading goes on without that binding.
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
        if (wrong := list(problems(_values()))) and troubles is None:
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
    scopes = (scope.split("/")[0] for (scope, selector), _ in _bound() if selector != MACRO)
    return tuple(declared if declared is not None else dict.fromkeys(s for s in scopes if s))


def required(name: str = "") -> tuple[str, ...]:
    """The keys for which an arm still needs a value: bound to %gin.REQUIRED."""
    effective = {}
    for scope in _enclosing(name):
        for (bound_in, selector), values in _bound():
            if bound_in == scope or selector == MACRO:
                for parameter, value in values.items():
                    macro = bound_in if selector == MACRO else ""
                    effective[macro, selector, parameter] = repr(value)
    return tuple(_key(*key) for key, value in effective.items() if value == "%gin.REQUIRED")


def query(key: str, default: Any = None) -> Any:
    """The value bound to a key such as 'Grid.axes', or the default.

    Macros are replaced by their values; references are kept, and their repr is legal gin.
    """
    scope, selector, parameter = config_parser.parse_binding_key(key)
    owner = config._REGISTRY.get_match(selector)
    found = config._CONFIG.get((scope, owner.selector), {}) if owner else {}
    name = present_name(selector, parameter)
    return _without_macros(found[name]) if name in found else default


def unbind(key: str) -> None:
    """Forget what is bound to a key such as 'run.dataset', inside and outside of every arm.

    gin builds what is bound even where a caller gives the parameter.
    """
    _, selector, parameter = config_parser.parse_binding_key(key)
    owner = config._REGISTRY.get_match(selector)
    for (_, bound_to), values in _bound():
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


def scopes() -> set[str]:
    """Every scope that holds bindings."""
    return {scope for (scope, selector), _ in _bound() if scope and selector != MACRO}


def scope_bindings(name: str) -> dict[str, str]:
    """What an arm binds, without its name: {'run.objective': '@mean_flow()'}."""
    return {
        _key("", selector, parameter): repr(value)
        for (scope, selector), values in _bound()
        for parameter, value in values.items()
        if scope == name and selector != MACRO
    }


def overridden_bindings(name: str) -> tuple[str, ...]:
    """The plain keys for which an arm has a value of its own."""
    own = scope_bindings(name) if name else {}
    return tuple(key for key in scope_bindings("") if key in own)


def anchor_paths(more: Mapping[str, Sequence[str]]) -> None:
    """Bind relative paths of files as whole ones; see registry/configuration/local_paths.py."""
    local_paths.anchor(more, _without_macros)


def full_text() -> str:
    """All that is bound, files and bindings merged, as gin text."""
    return str(gin.config_str(max_line_length=100))


def operative_text() -> str:
    """What has been used since `parse`, defaults of the parts included, as gin text."""
    return str(gin.operative_config_str(max_line_length=100))


def operative_values() -> dict[str, str]:
    """What has been used since `parse`, by key: macros replaced by their values, in order."""
    found = {
        _key(scope, selector, parameter): repr(_without_macros(value))
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
    """The keys that two results of `bindings_of` bind differently.

    A macro that one of them alone reads is left out: the other one binds its value directly, and
    the values are compared where they are used.
    """
    return [
        key
        for key in sorted({**ours, **theirs})
        if ours.get(key) != theirs.get(key) and ("." in key or (key in ours and key in theirs))
    ]


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
        _key(scope, selector, parameter)
        for (scope, selector), values in _bound()
        if selector != MACRO and scope.split("/")[0] not in others
        if config._REGISTRY.minimal_selector(selector) not in ignore
        for parameter in values
        if (scope, selector, parameter) not in used
    )


def _bound() -> Iterable[tuple[tuple[str, str], dict[str, Any]]]:
    """((scope, full selector), {parameter: value}); a macro is a scope with the selector MACRO."""
    return tuple(config._CONFIG.items())


def _values() -> Iterator[tuple[str, str, str, Any]]:
    """Every binding: its key, selector, parameter and value, with macros replaced by theirs."""
    for (scope, selector), values in _bound():
        for parameter, value in values.items():
            key = _key(scope, selector, parameter)
            if not repr(value) == "%gin.REQUIRED":
                yield key, selector, parameter, _without_macros(value)


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
    return _key(scope, owner.selector, name(selector, parameter)) if owner else key


def _key(scope: str, selector: str, parameter: str) -> str:
    if selector == MACRO:
        return scope
    short = config._REGISTRY.minimal_selector(selector)
    return f"{scope}/{short}.{parameter}" if scope else f"{short}.{parameter}"


def _enclosing(scope: str) -> list[str]:
    """'a/b' -> ['', 'a', 'a/b']: where gin looks for bindings, the last one wins."""
    parts = scope.split("/") if scope else []
    return ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _is_macro(value: object) -> bool:
    return isinstance(value, config.ConfigurableReference) and value.configurable.selector == MACRO


def _several(name: str) -> str:
    return "Give --arm again for each of several arms. " if "," in name else ""


def _without_macros(value: Any) -> Any:
    if _is_macro(value):
        bound = config._CONFIG.get(value.config_key, {})
        if "value" not in bound:
            name = value.config_key[0]
            raise ValueError(
                f"the macro %{name} is read, and it is not set. Add a line such as {name} = 1"
            )
        return _without_macros(bound["value"])
    if isinstance(value, Mapping):
        return {_without_macros(k): _without_macros(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_macros(v) for v in value)
    return value


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
    macros = [scope for (scope, selector), _ in _bound() if selector == MACRO]
    read = set()
    for (scope, selector), values in _bound():
        for parameter, value in values.items():
            for reference in filter(_is_macro, config.iterate_references([value])):
                macro = reference.config_key[0]
                read.add(macro)
                if macro not in macros:
                    raise ValueError(
                        f"{_key(scope, selector, parameter)} reads the macro %{macro}, which is "
                        f"not set.{did_you_mean(macro, macros)} Add a line such as {macro} = 1"
                    )
            for reference in config.iterate_references([value]):
                if not reference.config_key[0]:  # %NAME is such a reference, scoped by its name
                    _check_reference(_key(scope, selector, parameter), reference.configurable)
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
