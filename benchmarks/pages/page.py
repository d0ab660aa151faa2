"""The page of one method: what its file says, its settings, its claims, its cost, its results."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import registry
from benchmarks.conformance.results import ClaimResult
from benchmarks.grids.result_table import result_table
from benchmarks.markdown import markdown
from benchmarks.pages.measured import KeptRuns, Measured
from benchmarks.runs.frame import frame
from benchmarks.speed.table import HEADER, StepCost, row_of
from registry.configuration.gin_files import settings_of
from registry.core import summary
from registry.protocols import Reference
from registry.sampling import in_words, trained_by
from zoo.samplers import valid_samplers

BASELINE = "flow_matching"  # stands first in every table of results
MADE_BY = "<!-- Made by `make method-pages` from the code and from measured.json; edit those. -->"


def method_page(name: str, measured: Measured) -> str:
    """The Markdown of the objective of this name; KeyError if there is none."""
    cls = registry.objectives.get(name)
    objective = cls()
    parts = [
        f"# {name}",
        MADE_BY,
        f"{summary(cls)}.",
        *_source(cls),
        _meeting(objective),
        "## The method",
        _described(cls),
        "## Settings",
        _settings(name, objective),
        *_gin_files(name),
        "## What check says",
        *_claims(name, measured),
        "## What a step costs",
        *_cost(name, measured),
        "## Results",
        *_results(name, measured),
    ]
    return "\n\n".join(parts) + "\n"


def _source(cls: type) -> list[str]:
    reference = getattr(cls, "reference", None)
    file = Path(sys.modules[cls.__module__].__file__ or "").name
    code = f"Its code is [zoo/objectives/{file}](../../zoo/objectives/{file})."
    return [*([cited(reference)] if isinstance(reference, Reference) else []), code]


def cited(reference: Reference) -> str:
    """The paper in one line, with a link where it is on arXiv."""
    if not reference.arxiv:
        return f"{reference.authors}, *{reference.title}*, {reference.year}."
    link = f"[arXiv {reference.arxiv}](https://arxiv.org/abs/{reference.arxiv})"
    return f"{reference.authors}, *{reference.title}*, {reference.year}, {link}."


def _meeting(objective: Any) -> str:
    first, *others = valid_samplers(objective)
    also = f" It can also be sampled by {_named(others)}." if others else ""
    return (
        f"It trains {in_words(trained_by(objective))}. Samples are drawn by `{first}` where no "
        f"sampler is bound.{also}"
    )


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _described(cls: type) -> str:
    """The module's docstring, whose formulas are indented, so that Markdown shows them as code."""
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(block if block.startswith("    ") else _escaped(block) for block in blocks)


def _escaped(paragraph: str) -> str:
    """With the characters that Markdown would read, outside of its code spans, as they are."""
    pieces = re.split(r"(`[^`]*`)", paragraph)
    pieces[::2] = [re.sub(r"([*|<]|\b_|_\b)", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _settings(name: str, objective: Any) -> str:
    rows = [
        [f"`{name}.{field.name}`", f"`{_type(field)}`", f"`{_default(field)}`"]
        for field in fields(objective)
    ]
    return markdown(["setting", "type", "default"], rows) if rows else "It has none."


def _type(field: Field[Any]) -> str:
    found = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    return str(found).replace("|", "or")


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return in_gin(field.default_factory())
    return in_gin(field.default)


def in_gin(value: object) -> str:
    """A value as a gin file writes it; of a part, with the fields that are not its defaults."""
    for kind in registry.kinds:
        if kind.holds(type(value)):
            return f"@{kind.name_of(value)}({', '.join(_changed(value))})"
    return repr(value)


def _changed(part: Any) -> Iterator[str]:
    for field in fields(part) if is_dataclass(part) else ():
        value = getattr(part, field.name)
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if value != default:
            yield f"{field.name}={in_gin(value)}"


def _gin_files(name: str) -> Iterator[str]:
    """The text of every file in gin/objective that binds the method."""
    for path in settings_of(name):
        yield f"In gin, `include 'objective/{path.name}'`:"
        yield f"```\n{path.read_text().strip()}\n```"


def _claims(name: str, measured: Measured) -> list[str]:
    command = f"`objective-zoo check {name}`"
    if name not in measured.checked:
        return [f"{command} was not run for this page."]
    found = measured.checked[name]
    met = sum(result.status == "ok" for result in found.results)
    failed = [result.claim for result in found.results if result.status == "FAIL"]
    outcome = f"fails in: {', '.join(failed)}" if failed else f"meets {met} claims"
    rows = [[r.claim, r.status, _escaped(_figure(r))] for r in found.results]
    return [
        f"{command} of version {found.version}: it {outcome}.",
        markdown(["claim", "outcome", "figure or reason"], rows),
    ]


def _figure(result: ClaimResult) -> str:
    return " ".join((result.figure or result.reason).split())


def _cost(name: str, measured: Measured) -> list[str]:
    passes = {
        row: count
        for compared in measured.compared.values()
        for row, count in compared.passes.items()
        if row in compared.of(name)
    }
    parts = ["Its passes were not counted for this page."]
    if passes:
        counts = ", ".join(f"{count:g} (`{row}`)" for row, count in passes.items())
        parts = [
            f"Late in a run, a step takes {counts} forward passes of the whole batch. A backward "
            "pass counts as two of them, and flow matching takes 3."
        ]
    own = [] if measured.speed is None else costs_of(name, measured.speed.costs)
    if measured.speed is not None and own:
        head = ["network", *HEADER]
        table = markdown(head, [[cost.group.replace("/", ", "), *row_of(cost)] for cost in own])
        parts += [f"Measured by `objective-zoo bench` on {measured.speed.machine}:", table]
    return parts


def costs_of(name: str, costs: Sequence[StepCost]) -> list[StepCost]:
    """The cases of an objective, whose arms begin with its name: `decm`, `decm_scratch`."""
    found = []
    for cost in costs:
        arm = cost.case.split("/")[0]
        owners = [
            known for known in registry.objectives.names() if f"{arm}_".startswith(f"{known}_")
        ]
        if owners and max(owners, key=len) == name:
            found.append(cost)
    return found


def _results(name: str, measured: Measured) -> list[str]:
    parts = []
    for compared in measured.compared.values():
        if own := compared.of(name):
            rows = {**compared.of(BASELINE), **own}
            parts += [f"### {compared.file}", _made(compared), result_table(frame(rows))]
    return parts or ["It was not measured for this page."]


def _made(compared: KeptRuns) -> str:
    facts = dict(compared.made)
    seeds = sorted({str(result.seed) for rows in compared.rows.values() for result in rows})
    return (
        f"`{compared.command}`, seed {', '.join(seeds)}, by version "
        f"{facts['version.objective-zoo']} ({facts['commit'][:7]}) with torch "
        f"{facts['version.torch']} on {facts['platform'].split('-with')[0]}."
    )
