"""A nan that a sampler or a gradient gives makes its claim fail; no comparison swallows it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conformance.expected.moments import _biases, largest
from benchmarks.conformance.expected.sampling import _check_law
from benchmarks.conformance.fixed_point import LIMIT
from benchmarks.conformance.results import Broken
from benchmarks.conformance.subject import GAUSSIAN


class Drawn:
    """Draws from the data's law; the first value is replaced by `first`, if one is given."""

    nfe = 1

    def __init__(self, first: float | None = None):
        self.first = first

    def __call__(self, network: Any, x1: Tensor, cond: Any, rng: torch.Generator) -> Tensor:
        x0 = GAUSSIAN.mean + GAUSSIAN.std * x1
        if self.first is not None:
            x0[0, 0] = self.first
        return x0


def test_one_sample_that_is_nan_breaks_the_law():
    assert _check_law("drawn", Drawn(), None, exact=True) < math.inf
    with pytest.raises(Broken, match="does not keep the data's law"):
        _check_law("drawn", Drawn(math.nan), None, exact=True)


def test_a_gradient_that_is_nan_is_the_largest_and_within_no_limit():
    gradient = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert largest(_biases(gradient, ["a", "b", "c"], floor=0.0)).z < LIMIT
    gradient[5, 1] = math.nan
    found = largest(_biases(gradient, ["a", "b", "c"], floor=0.0))
    assert found.output == "b"
    assert not found.z < LIMIT
