"""Both ways of asking `one_pass` for a derivative, for its tests."""

from __future__ import annotations

import pytest
from torch import Tensor

from zoo.derivatives.one_pass import OnePass

each_way = pytest.mark.parametrize("way", ["with_value", "linearized"])


def both(way, fn, primals, tangents, key="u"):
    """Outputs and the derivative of one of them, by either way of asking."""
    if way == "with_value":
        return OnePass().with_value(fn, primals, tangents, key)
    out, du_along = OnePass().linearized(fn, primals, key)
    return out, du_along(tangents)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
