"""Derivatives of one's own beside ours: what is exact, by differences, or trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from trained_derivatives import Lsd

from benchmarks.conformance.claims import derivatives_agree
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from registry import derivatives
from zoo.derivatives.methods import Dual, FiniteDifference
from zoo.objectives import MeanFlow


@dataclass(frozen=True, kw_only=True)
class Differences:
    """By differences, and not trained."""

    needs_forward_ad: ClassVar = False
    factor: ClassVar = 1.0

    def __call__(self, fn, primals, tangents):
        return self.factor * FiniteDifference()(fn, primals, tangents)


class TooLarge(Differences):
    factor: ClassVar = 1.01


@dataclass(frozen=True, kw_only=True)
class SaysExact(Differences):
    needs_forward_ad: ClassVar = True


class TrainedTooLarge(Dual):
    def with_graph(self, fn, primals, tangents, key):
        out, moved = super().with_graph(fn, primals, tangents, key)
        return out, 1.01 * moved


def agree(objective, cls):
    with derivatives.temporary("of_ones_own", cls):
        return run_claim("derivatives agree", derivatives_agree, Subject("own", objective))


@pytest.mark.parametrize("objective", [MeanFlow, Lsd])
def test_one_by_differences_need_not_be_exact_nor_trained(objective):
    found = agree(objective, Differences)
    assert found.status == "ok", found.reason


@pytest.mark.parametrize(
    ("objective", "cls"),
    [(MeanFlow, TooLarge), (MeanFlow, SaysExact), (Lsd, TrainedTooLarge)],
)
def test_a_wrong_one_is_rejected(objective, cls):
    found = agree(objective, cls)
    assert found.status == "FAIL"
    assert "derivative backends disagree" in found.reason
