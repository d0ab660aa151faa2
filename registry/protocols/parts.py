"""Where a part comes from and which parts are inside it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

SHORTEST_WORD = 4  # of a title, in a BibTeX key


@dataclass(frozen=True)
class Reference:
    """Where a part comes from; `arxiv` is the bare identifier, such as "2505.13447"."""

    title: str
    authors: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        where = f"arXiv {self.arxiv}" if self.arxiv else str(self.year)
        return f"{self.authors}, {self.title}, {where}"

    def bibtex(self) -> str:
        """An entry whose key is the first surname, the year and the title's first long word."""
        lines = [f"  title = {{{self.title}}}", f"  author = {{{_bibtex_authors(self.authors)}}}"]
        lines += [f"  year = {{{self.year}}}"]
        if self.arxiv:
            lines += [f"  eprint = {{{self.arxiv}}}", "  archivePrefix = {arXiv}"]
        return f"@misc{{{self.key},\n" + ",\n".join(lines) + "\n}"

    @property
    def key(self) -> str:
        """Such as "geng2025mean", in ASCII, as BibTeX wants it."""
        surname = re.split(r"[ ,]", self.authors)[0]
        words = [word for word in re.findall(r"[^\W_]+", self.title) if len(word) >= SHORTEST_WORD]
        plain = unicodedata.normalize("NFKD", f"{surname}{self.year}{words[0] if words else ''}")
        return plain.encode("ascii", "ignore").decode().lower()


def _bibtex_authors(authors: str) -> str:
    """Surnames as BibTeX separates them: "Ho et al." is "Ho and others" there."""
    return authors.replace(" et al.", " and others").replace(", ", " and ")


def parts(obj: object) -> Iterator[tuple[str, Any]]:
    """The (field name, value) pairs of a dataclass, and of the dataclasses inside it."""
    if is_dataclass(obj) and not isinstance(obj, type):
        for f in fields(obj):
            value = getattr(obj, f.name)
            yield f.name, value
            for inner, part in parts(value):
                yield f"{f.name}.{inner}", part


def couples_rows(objective: Any) -> bool:
    """Whether a row's loss depends on other rows, by the objective or by one of its parts."""
    inside = (objective, *(part for _, part in parts(objective)))
    return any(getattr(part, "couples_rows", False) for part in inside)


def group_of(objective: Any) -> int:
    """How many rows a group has, by the objective or by a part of it; 1 where none declares it.

    ValueError for a size that is no whole number of 1 or more, and for parts that differ.
    """
    inside = (("", objective), *parts(objective))
    declared = {path: part.group for path, part in inside if hasattr(part, "group")}
    owner = type(objective).__name__
    for path, group in declared.items():
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise ValueError(
                f"{'.'.join(filter(None, (owner, path)))} declares group = {group!r}; it must be "
                "a whole number of rows, 1 or more"
            )
    sizes = {group for group in declared.values() if group > 1}
    if len(sizes) > 1:
        given = ", ".join(f"{path or 'itself'}: {group}" for path, group in declared.items())
        raise ValueError(
            f"{owner} has parts that declare groups of different sizes ({given}); a batch is cut "
            "into groups of one size"
        )
    return sizes.pop() if sizes else 1


def required_heads(objective: Any) -> tuple[str, ...]:
    """The outputs that the objective trains, and then those that its weights read."""
    names = list(objective.heads)
    for _, part in parts(objective):
        if callable(part) and isinstance(getattr(type(part), "heads", None), tuple):
            names += type(part).heads
    return tuple(dict.fromkeys(names))
