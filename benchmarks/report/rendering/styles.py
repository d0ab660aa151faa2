"""How a row is drawn in every figure: colour, marker and dash, which also differ in grey print.

The colours are those of Okabe and Ito, chosen for colour-blind readers, without the yellow, which
paper does not show, and with grey in place of black, which a dark page does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("solid", "dashed", "dashdot", "dotted")

PLOTLY_MARKERS = dict(
    zip(
        MARKERS,
        ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"),
        strict=True,
    )
)
PLOTLY_DASHES = {"solid": "solid", "dashed": "dash", "dashdot": "dashdot", "dotted": "dot"}


@dataclass(frozen=True)
class RowStyle:
    """A row's colour, marker and dash, by matplotlib's names."""

    colour: str
    marker: str
    dash: str

    @property
    def band(self) -> str:
        """The colour, nearly transparent."""
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.18)"


def styles_of(groups: Sequence[str]) -> dict[str, RowStyle]:
    """The styles of all rows; 7 x 8 x 4 of them are different."""
    return {
        group: RowStyle(
            COLOURS[i % len(COLOURS)],
            MARKERS[i % len(MARKERS)],
            DASHES[(i + i // len(COLOURS)) % len(DASHES)],
        )
        for i, group in enumerate(groups)
    }
