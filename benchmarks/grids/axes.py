"""What a grid is: arms (gin scopes) x axes (keys and their values) -> the settings of its cells.

    Grid:
      arms = ('dumo', 'mean_flow')
      axes = {'run.steps': [500, 1000], 'ema.decay': [0.99, 0.999]}
      mode = 'product'                     # every combination: 4 settings
      repeat = {'run.seed': [0, 1, 2]}     # crossed with every cell: 4 x 2 arms x 3 seeds

In the mode 'zip' the axes move together (2 settings), and a value may come again. In the mode
'one_at_a_time' there is the file's own setting, and each axis varied around it alone (5). `repeat`
holds in every mode. A value is whatever gin can write: number, text, tuple, reference (`@jvp()`) or
macro. The key 'include' stands for whole files, a key without a dot for a macro. A grid of more
than `max_cells` is refused.

Axes are read, not built: a setting is a tuple of pairs of texts, key and gin value.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import gin

from registry import gin_setup
from registry.ranges import Count

MODES = ("product", "zip", "one_at_a_time")
MAX_CELLS = 10_000  # each is built before any of them runs
INCLUDE = "include"

T = TypeVar("T")
Setting = tuple[tuple[str, str], ...]
Axes = Mapping[str, Sequence[str]]


@gin.register("Grid")
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Which arms a file compares, along which axes, and where the cells run.

    The gin text that a run keeps also binds `only`, its arm, and `folders`, where the Python files
    that it imports lie. Such a text is one cell, whatever axes it lists.
    """

    arms: tuple[str, ...] = ()
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    mode: str = "product"
    repeat: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    launcher: Any = None
    max_cells: Count = MAX_CELLS
    only: str | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The axes that the parsed files declare, their values as gin text."""

    axes: Axes = field(default_factory=dict)
    mode: str = "product"
    repeat: Axes = field(default_factory=dict)
    max_cells: int = MAX_CELLS

    def __bool__(self) -> bool:
        return bool(self.axes or self.repeat)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.axes, *self.repeat)

    def cells(self, arms: Sequence[str]) -> list[tuple[str, Setting]]:
        """Every arm in every setting, one repetition after the other.

        So a grid that is stopped early has complete repetitions. ValueError for more than
        `max_cells`.
        """
        settings, again = (
            num_settings(varied, mode)
            for varied, mode in ((self.axes, self.mode), (self.repeat, "product"))
        )
        if (count := again * len(arms) * settings) > self.max_cells:
            raise ValueError(
                f"this grid has {count:,} cells ({again:,} repetitions x {len(arms)} arms x "
                f"{settings:,} settings of its axes), more than Grid.max_cells = "
                f"{self.max_cells:,}. Shorten its axes, or raise the limit: "
                f"--set 'Grid.max_cells = {count}'"
            )
        return [
            (arm, setting + again)
            for again in vary(self.repeat, "product")
            for arm in arms
            for setting in vary(self.axes, self.mode)
        ]


def vary(axes: Axes, mode: str) -> Iterable[Setting]:
    """Every setting of these axes, in the order of their values, which are distinct."""
    columns = [[(key, value) for value in values] for key, values in axes.items()]
    if mode == "one_at_a_time":
        return [(), *((pair,) for column in columns for pair in column)]
    if not columns:
        return [()]
    return zip(*columns, strict=True) if mode == "zip" else itertools.product(*columns)


def num_settings(axes: Axes, mode: str) -> int:
    """The number of settings that `vary` gives, without making them."""
    lengths = list(map(len, axes.values()))
    if mode == "one_at_a_time":
        return 1 + sum(lengths)
    return min(lengths, default=1) if mode == "zip" else math.prod(lengths)


def declared(folder: Path) -> Declared:
    """What Grid.axes, Grid.mode and Grid.repeat say; files in them are found from `folder`."""
    if gin_setup.query("Grid.only") is not None:
        return Declared()
    mode = gin_setup.query("Grid.mode", "product")
    if mode not in MODES:
        raise ValueError(f"Grid.mode = {mode!r} is none of {', '.join(MODES)}")
    found = Declared(
        axes=_read("Grid.axes", folder, may_repeat=mode == "zip"),
        mode=mode,
        repeat=_read("Grid.repeat", folder),
        max_cells=gin_setup.query("Grid.max_cells", MAX_CELLS),
    )
    axes, repeat = ({gin_setup.own_key(key) for key in a} for a in (found.axes, found.repeat))
    if both := sorted(axes & repeat):
        raise ValueError(f"{', '.join(both)} is in Grid.axes and in Grid.repeat; keep one of them")
    lengths = {key: len(values) for key, values in found.axes.items()}
    if found.mode == "zip" and len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise ValueError(
            f"Grid.mode = 'zip' moves all axes together, so they need equally many values: {counts}"
        )
    if found.mode == "zip" and (twice := _repeated(vary(found.axes, "zip"))):
        raise ValueError(f"Grid.axes has the setting {label('', twice[0])} more than once")
    return found


def _repeated(values: Iterable[T]) -> list[T]:
    return [value for value, count in Counter(values).items() if count > 1]


def _read(name: str, folder: Path, may_repeat: bool = False) -> dict[str, list[str]]:
    """The axes by key; `may_repeat` says whether an axis may have a value more than once."""
    bound = gin_setup.query(name, {})
    if not isinstance(bound, dict):
        raise ValueError(f"{name} = {bound!r} must be a dict, such as {{'run.seed': [0, 1, 2]}}")
    axes: dict[str, list[str]] = {}
    for key, values in bound.items():
        if not isinstance(key, str) or not isinstance(values, list | tuple) or not values:
            raise ValueError(
                f"{name} has {key!r}: {values!r}; it takes keys with lists of values, such as "
                "'run.seed': [0, 1, 2]"
            )
        texts = [_text(key, value, folder) for value in values]
        if not may_repeat and (twice := _repeated(texts)):
            raise ValueError(f"{name} gives {key} the value {', '.join(twice)} more than once")
        if again := [other for other in axes if gin_setup.own_key(other) == gin_setup.own_key(key)]:
            raise ValueError(f"{name} has {again[0]} and {key}, which are one parameter; keep one")
        axes[key] = texts
    return axes


def _text(key: str, value: Any, folder: Path) -> str:
    if key != INCLUDE:
        return repr(value)
    if not isinstance(value, str):
        raise ValueError(f"the axis 'include' takes names of gin files, not {value!r}")
    return repr(str(gin_setup.resolve(value, folder)))


def bindings(arm: str, setting: Setting) -> tuple[str, ...]:
    """The setting as gin text, in the scope of the arm, so that it wins over what the arm binds.

    Files, macros and keys with a scope of their own are left as they are.
    """
    return tuple(
        f"include {value}" if key == INCLUDE else f"{bound_key(arm, key)} = {value}"
        for key, value in setting
    )


def bound_key(arm: str, key: str) -> str:
    return f"{arm}/{key}" if arm and "." in key and "/" not in key else key


def label(arm: str, setting: Setting) -> str:
    """A short name: 'mean_flow power=0.5 derivative=jvp'."""
    keys = [key for key, _ in setting]
    short = [key.split("/")[-1].split(".")[-1] for key in keys]
    pairs = [
        f"{name if short.count(name) == 1 else key}={_plain(key, value)}"
        for key, name, (_, value) in zip(keys, short, setting, strict=True)
    ]
    return " ".join([*([arm] if arm else []), *pairs])


def slug(text: str) -> str:
    """The text as part of a file name."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_.")[:100]


def _plain(key: str, value: str) -> str:
    if key == INCLUDE:
        return Path(value.strip("'\"")).stem
    return re.sub(r"@((?:\w+/)*\w+)(?:\(\))?", r"\1", value).replace("'", "").replace('"', "")
