"""Intervals and paired differences against closed forms, and that they cover what they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.report.intervals import Interval, interval, paired

# t(0.975, n - 1) of printed tables.
T = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}


@pytest.mark.parametrize("n", T)
def test_interval_is_student_t(n):
    values = list(range(n))
    found = interval(values)
    wanted = T[n] * np.std(values, ddof=1) / math.sqrt(n)
    assert found.mean == pytest.approx((n - 1) / 2)
    assert found.half == pytest.approx(wanted, rel=1e-3)  # the tables have four digits
    assert (found.n, found.low, found.high) == (n, found.mean - found.half, found.mean + found.half)


def test_interval_is_that_of_scipys_test_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 4)
    found, wanted = interval(values), stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    # The two sum in another order.
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-13)


def test_equal_values_have_an_interval_without_width():
    assert interval([2.0, 2.0, 2.0]) == Interval(2.0, 0.0, 3)


def test_interval_covers_the_truth_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        found = interval(rng.normal(1.0, 2.0, 3))
        covered += found.low <= 1.0 <= found.high
    # Standard error of the share: sqrt(0.95 * 0.05 / 4000) = 0.0034.
    assert covered / 4000 == pytest.approx(0.95, abs=4 * 0.0034)


def test_one_value_has_no_interval_and_no_sign():
    found = interval([3.0])
    assert found == Interval(3.0, None, 1)
    assert (found.low, found.high, found.sign) == (None, None, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_gives_no_sign(bad):
    assert interval([1.0, bad, 2.0]).sign == 0


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6))
def test_sign_says_whether_zero_is_outside(values):
    found = interval(values)
    outside = not found.low <= 0 <= found.high
    assert (found.sign != 0) == outside
    assert found.sign * found.mean >= 0


def test_difference_is_paired_by_seed():
    """The seeds' common part cancels: the rows scatter by 100, the difference not at all."""
    ours = {0: 101.0, 1: 201.0, 2: 301.0}
    theirs = {2: 300.0, 0: 100.0, 1: 200.0, 9: 7.0}
    assert paired(ours, theirs) == Interval(1.0, 0.0, 3)
    assert paired(theirs, ours) == Interval(-1.0, 0.0, 3)
    assert paired(ours, {5: 1.0}) is None


def test_ratio_is_paired_by_seed():
    assert paired({0: 2.0, 1: 6.0}, {0: 1.0, 1: 3.0}, ratio=True) == Interval(2.0, 0.0, 2)
