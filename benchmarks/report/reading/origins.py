"""Where the rows come from: what they share, what differs, and the gin text of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.reading.comparability import UNSTATED, facts
from benchmarks.report.reading.recorded_runs import RecordedCell

MISSING = "-"
_TAGS = ("objective", "backbone", "sampler", "commit", "dirty", "platform", "cpus", "gpus")


@dataclass(frozen=True, kw_only=True)
class Origins:
    """Facts by name: the value that all rows share, or by row where they differ.

    Where the cells of one row disagree, the row's value lists all of theirs.
    """

    shared: Mapping[str, str]
    differing: Mapping[str, Mapping[str, str]]
    bindings: Mapping[str, Mapping[str, str]]  # those that differ between rows
    texts: Mapping[str, str]  # the operative gin text of each row's first seed


def origins_of(cells: Sequence[RecordedCell]) -> Origins:
    groups: dict[str, list[RecordedCell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    known = {group: [_facts(cell) for cell in members] for group, members in groups.items()}
    bound = {group: [members[0].bindings] for group, members in groups.items()}
    seeds = {group: _listed([str(c.seed) for c in members]) for group, members in groups.items()}
    shared, differing = _apart(known)
    if len(set(seeds.values())) == 1:
        shared = {"seeds": next(iter(seeds.values())), **shared}
    else:
        differing = {"seeds": seeds, **differing}
    return Origins(
        shared=shared,
        differing=differing,
        bindings=dict(sorted(_apart(bound)[1].items(), key=_unshared)),
        texts={group: members[0].record.text("operative.gin") for group, members in groups.items()},
    )


def _facts(cell: RecordedCell) -> dict[str, str]:
    tags = cell.record.tags
    versions = {k.removeprefix("version."): v for k, v in tags.items() if k.startswith("version.")}
    known = {name: tags.get(name, UNSTATED) for name in _TAGS}
    reference = facts(cell)["reference"]
    measured = {**facts(cell), "reference": f"{reference} (seed {cell.seed})"}
    return {**measured, **known, **versions}


def _apart(
    known: Mapping[str, Sequence[Mapping[str, str]]],
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    names = dict.fromkeys(name for values in known.values() for one in values for name in one)
    shared, differing = {}, {}
    for name in names:
        by_group = {
            group: _listed([one.get(name, MISSING) for one in values])
            for group, values in known.items()
        }
        if len(set(by_group.values())) == 1:
            shared[name] = next(iter(by_group.values()))
        else:
            differing[name] = by_group
    return shared, differing


def _unshared(binding: tuple[str, Mapping[str, str]]) -> bool:
    """A key to sort by: bindings of a single row come after those of several rows."""
    return sum(value != MISSING for value in binding[1].values()) < 2


def _listed(values: Sequence[str]) -> str:
    return " | ".join(dict.fromkeys(values))
