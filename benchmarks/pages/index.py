"""The page that lists the methods, with what their own pages say at length."""

from __future__ import annotations

from typing import Any

import registry
from benchmarks.markdown import markdown
from benchmarks.pages.measured import Measured
from benchmarks.pages.page import MADE_BY
from registry.core import summary
from registry.protocols import Reference
from registry.sampling import trained_by

ABOUT = """\
One page for each method: its equation, what is the paper's and what is our reading, its settings,
what `objective-zoo check` says of it, what a step costs and what was measured. `make method-pages`
writes them from the code and from the records."""


def methods() -> list[str]:
    """The names of the objectives of this project, without those of plug-ins."""
    names = registry.objectives.names()
    return [name for name in names if registry.objectives.get(name).__module__.startswith("zoo.")]


def index_page(measured: Measured) -> str:
    """The Markdown of the list."""
    header = ["method", "paper", "trains", "passes", "claims"]
    rows = [_row(name, measured) for name in methods()]
    lines = [
        f"- [{name}]({name}.md): {summary(registry.objectives.get(name))}." for name in methods()
    ]
    note = (
        "Passes are forward passes of the whole batch in a step, where a backward counts two and "
        "flow matching takes 3; claims are those of check that it meets."
    )
    return (
        "\n\n".join(["# Methods", MADE_BY, ABOUT, "\n".join(lines), markdown(header, rows), note])
        + "\n"
    )


def _row(name: str, measured: Measured) -> list[str]:
    objective: Any = registry.objectives.get(name)()
    reference = getattr(objective, "reference", None)
    paper = "-"
    if isinstance(reference, Reference):
        year = f"{reference.authors}, {reference.year}"
        link = f"[{year}](https://arxiv.org/abs/{reference.arxiv})"
        paper = link if reference.arxiv else year
    counts = {
        count
        for compared in measured.compared.values()
        for row, count in compared.passes.items()
        if row == name
    }
    checked = measured.checked.get(name)
    met = sum(r.status == "ok" for r in checked.results) if checked else None
    return [
        f"[{name}]({name}.md)",
        paper,
        ", ".join(trained_by(objective)),
        ", ".join(f"{count:g}" for count in sorted(counts)) or "-",
        "-" if met is None else str(met),
    ]
