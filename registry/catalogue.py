"""What is registered: every part with one line and its paper."""

from __future__ import annotations

from pathlib import Path

import registry
from registry.core import Registry, summary
from registry.plugins import import_file, load_plugins
from registry.protocols import Reference


def catalogue(kind: str | None = None, file: Path | None = None, *, bibtex: bool = False) -> str:
    """The text of `objective-zoo list`: plug-ins too, and the parts of one more Python file."""
    load_plugins()
    if file is not None:
        import_file(file)
    chosen = list(registry.kinds) if kind is None else [kind_named(kind)]
    if bibtex:
        return "\n\n".join(_references(chosen))
    return "\n\n".join(_section(k) for k in chosen if k.names())


def kind_named(name: str) -> Registry:
    """The registry of a kind, such as "objective", "objectives" or "time_law"."""
    for kind in registry.kinds:
        word = kind.kind.replace(" ", "_")
        if name.replace(" ", "_") in (word, f"{word}s"):
            return kind
    known = ", ".join(k.kind for k in registry.kinds)
    raise ValueError(f"no kind of part is called {name!r}; there are: {known}")


def _section(kind: Registry) -> str:
    width = max(map(len, kind.names()))
    lines = [f"{kind.kind}s" if not kind.kind.endswith("s") else kind.kind]
    for name in kind.names():
        cls = kind.get(name)
        paper = f"  [{reference}]" if (reference := reference_of(cls)) else ""
        lines.append(f"  {name:<{width}}  {summary(cls)}{paper}")
    return "\n".join(lines)


def _references(kinds: list[Registry]) -> list[str]:
    found = [reference_of(kind.get(name)) for kind in kinds for name in kind.names()]
    return list(dict.fromkeys(reference.bibtex() for reference in found if reference))


def reference_of(cls: type) -> Reference | None:
    """The paper; a data set's `reference` is a method."""
    found = getattr(cls, "reference", None)
    return found if isinstance(found, Reference) else None
