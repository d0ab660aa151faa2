"""A distance in place of its square moves the optimum from a mean to a geometric median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from benchmarks.conformance import fixed_point
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from zoo.objectives.consistency import Consistency


@dataclass(frozen=True)
class Root:
    """The distance itself, in a part that is not registered, so that no form is without it."""

    heads: ClassVar[tuple[str, ...]] = ()

    def __call__(self, error, out):
        return (error + 1e-16).sqrt()


class Defaults(Consistency):
    """It declares that its defaults are exact."""

    exact_with: ClassVar = {}


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Defaults, Consistency])
def test_a_distance_is_not_exact_at_a_skewed_mixture(cls):
    subject = Subject("mine", lambda: cls(weight=Root()))
    result = run_claim("fixed point", fixed_point.at_mixture, subject)
    assert result.status == "FAIL"
    assert "the exact solution is no fixed point" in result.reason
