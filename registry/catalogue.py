"""What is registered: every part with one line, its paper, and how objective and sampler meet."""

from __future__ import annotations

from pathlib import Path

import registry
from registry.configuration.gin_files import settings_of
from registry.core import Registry, summary
from registry.plugins import import_file, load_plugins
from registry.protocols import Reference
from registry.sampling import declares, needed_by, trained_by


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
        for word, names in meeting(kind, cls).items():
            lines.append(f"  {'':<{width}}  {word}: {names}")
        files = settings_of(name) if kind is registry.objectives else []
        for path in files:
            if path.stem != name:
                lines.append(f"  {'':<{width}}  as {path.stem}: include 'objective/{path.name}'")
    return "\n".join(lines)


def _references(kinds: list[Registry]) -> list[str]:
    found = [reference_of(kind.get(name)) for kind in kinds for name in kind.names()]
    return list(dict.fromkeys(reference.bibtex() for reference in found if reference))


def meeting(kind: Registry, cls: type) -> dict[str, str]:
    """{"trains": ...} of an objective, {"needs": ...} of a sampler, by name.

    Where the fields of an objective decide, the docstring of its property says what.
    """
    if kind is registry.samplers:
        return {"needs": ", ".join(needed_by(cls)) or "what the sampler inside it needs"}
    if kind is not registry.objectives or declares(cls, "trains", "samplers") == "samplers":
        return {}
    if isinstance(by_fields := getattr(cls, "trains", None), property):
        return {"trains": summary(by_fields) or "what its fields decide"}
    return {"trains": ", ".join(trained_by(cls))}


def reference_of(cls: type) -> Reference | None:
    """The paper; a data set's `reference` is a method."""
    found = getattr(cls, "reference", None)
    return found if isinstance(found, Reference) else None
