"""Limits on what a configuration may build, which are the sizes of the file of its weights.

A configuration of somebody else may ask for 10^8 layers, which would take minutes and all of the
memory before the first tensor is compared with the file. What is built has one parameter for each
tensor of the file, so that building stops as soon as there are clearly more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backbones.counting import Made, counted

Shapes = Mapping[str, tuple[int, ...]]

# A backbone may make a part and then replace it, and tables such as positions are in no file.
_SPARE_TENSORS, _SPARE_ELEMENTS, _TABLES = 100, 10**6, 2**26


def check_numbers(fields: Mapping[str, Any], shapes: Shapes, config: Path) -> None:
    """ValueError for a number that is not finite or exceeds the number of values in the file."""
    most = max(_elements(shapes), 2**16)
    for name, value in fields.items():
        if any(not abs(number) <= most for number in _numbers(value)):
            raise ValueError(
                f"{config} says {name} = {value!r}, and the file of its weights holds "
                f"{_elements(shapes):,} values: the two do not belong together"
            )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float):
        yield value


@contextmanager
def no_larger_than(shapes: Shapes, config: Path) -> Iterator[None]:
    """While it is open, ValueError stops the making of a network that these tensors cannot fill.

    For networks on the meta device, where tensors take no memory.
    """
    tensors, elements = 2 * len(shapes) + _SPARE_TENSORS, 2 * _elements(shapes) + _SPARE_ELEMENTS

    def check(made: Made) -> None:
        if (
            made.tensors > tensors
            or made.elements > elements
            or made.tables > max(_TABLES, 2 * elements)
        ):
            raise ValueError(
                f"{config} describes a larger network than the file of its weights holds, which "
                f"has {len(shapes)} tensors with {_elements(shapes):,} values. One of the two is "
                "not what was exported"
            )

    with counted(check):
        yield


def _elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
