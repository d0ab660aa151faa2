"""Named parts: one decorator stores a class under its name and makes it a gin selector.

    @objectives.register("mean_flow")
    class MeanFlow: ...

The name is the registry key, the gin selector (`@mean_flow()`), the word on the command line, the
test id and the MLflow tag. Names are unique over all kinds, so that the short selector always
resolves. The class comes back unchanged: plain Python calls are untouched and instances pickle.
"""

from __future__ import annotations

import difflib
import importlib.util  # noqa: F401  gin 0.5.0 uses importlib.util without importing it
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import gin

if not hasattr(gin, "register"):
    raise ImportError(
        "the module 'gin' found is not gin-config, but the folder of gin files. "
        "Install it: pip install gin-config"
    )

C = TypeVar("C", bound=type)

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_RESERVED = frozenset({"run", "macro", "constant", "singleton", "import", "include", "from"})
_OWNERS: dict[str, Registry] = {}


class Registry:
    """The classes of one kind, by name; `check` may reject a class with a ValueError."""

    def __init__(self, kind: str, check: Callable[[str, type], None] | None = None):
        self.kind = kind
        self._check = check
        self._classes: dict[str, type[Any]] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Decorator: enrol a class under `name` (snake_case) and make it the gin selector `@name`.

        Raises ValueError for a name that is not snake_case, one that is taken (by any kind), or
        a class that does not keep the contract of its kind.
        """

        def enrol(cls: C) -> C:
            self._add(name, cls)
            return cls

        return enrol

    def get(self, name: str) -> type[Any]:
        """The class; KeyError with the nearest match and every registered name if unknown."""
        try:
            return self._classes[name]
        except KeyError:
            raise KeyError(_unknown(self, name)) from None

    def build(self, name: str, **kwargs: Any) -> Any:
        """Build an instance; gin gives it the arguments that are not given here."""
        return gin.get_configurable(self.get(name))(**kwargs)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._classes))

    def name_of(self, part: object) -> str:
        """The name under which the part's class, or its nearest base, was registered."""
        cls = part if isinstance(part, type) else type(part)
        for ancestor in cls.__mro__:
            for name, registered in self._classes.items():
                if registered is ancestor:
                    return name
        raise KeyError(f"{cls.__name__} is not a registered {self.kind}")

    def holds(self, cls: type) -> bool:
        """Whether this very class is registered, not a base of it."""
        return cls in self._classes.values()

    def __contains__(self, name: str) -> bool:
        return name in self._classes

    @contextmanager
    def temporary(self, name: str, cls: type) -> Iterator[type]:
        """Register the class inside a `with` block only; for tests."""
        self._add(name, cls)
        try:
            yield cls
        finally:
            self._remove(name)

    def _add(self, name: str, cls: type) -> None:
        if not _NAME.match(name):
            raise ValueError(f"{self.kind} name {name!r} is not snake_case, such as 'mean_flow'")
        if name in _RESERVED:
            raise ValueError(
                f"{self.kind} name {name!r} means something else in gin; choose another"
            )
        owner = _OWNERS.get(name)
        if owner is not None and not (owner is self and _same_source(self._classes[name], cls)):
            taken = owner._classes[name]
            raise ValueError(
                f"{self.kind} name {name!r} is taken by the {owner.kind} "
                f"{taken.__module__}.{taken.__qualname__} ({_where(taken)}); choose another name"
            )
        known = gin.config._INVERSE_REGISTRY.get(cls)
        if known is not None and known.name != name:
            raise ValueError(
                f"{cls.__qualname__} is registered as {known.name!r} already; one thing has one "
                f"name: make a subclass to register {name!r}"
            )
        if self._check is not None:
            self._check(name, cls)
        if owner is not None:
            self._remove(name)  # the same definition was run a second time
        gin.register(name, module=self.kind.replace(" ", "_"))(cls)
        self._classes[name] = cls
        _OWNERS[name] = self

    def _remove(self, name: str) -> None:
        cls = self._classes.pop(name)
        del _OWNERS[name]
        # gin has no public way to forget a configurable.
        gin.config._REGISTRY.pop(f"{self.kind.replace(' ', '_')}.{name}")
        gin.config._INVERSE_REGISTRY.pop(cls, None)


def summary(part: type | property) -> str:
    """The first line of the docstring of a class or property, without its full stop."""
    # Its own docstring: an inherited one, such as that of nn.Module, says nothing about the class.
    text = inspect.cleandoc(part.__doc__ or "")
    return text.split("\n", 1)[0].rstrip(".")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint such as " Did you mean 'mean_flow'?", or '' if no known name is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _unknown(registry: Registry, name: str) -> str:
    elsewhere = f" ({name!r} is a {_OWNERS[name].kind}.)" if name in _OWNERS else ""
    return (
        f"no {registry.kind} named {name!r}.{did_you_mean(name, registry.names())}{elsewhere} "
        f"Registered: {', '.join(registry.names()) or 'none'}"
    )


def _where(cls: type) -> str:
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return "defined interactively"


def _same_source(one: type, other: type) -> bool:
    """Whether both come from one definition: a module imported, or a notebook cell run, twice."""
    if one.__qualname__ != other.__qualname__ or "<locals>" in one.__qualname__:
        return False
    if one.__module__ == other.__module__ == "__main__":
        return True
    try:
        return inspect.getsourcefile(one) == inspect.getsourcefile(other)
    except (OSError, TypeError):
        return False
