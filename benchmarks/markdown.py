"""Aligned Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]) + " |"

    rule = "|".join([f"{'':-<{widths[0] + 2}}", *(f"{'':-<{w + 1}}:" for w in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])
