"""Names in MLflow: every one is taken, and no two of ours become one."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from benchmarks.records.mlflow_names import MAX_NAME_LENGTH, stored_name

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text(
    "a_x4/.@", max_size=9
)


@given(name=names)
def test_every_name_becomes_one_that_mlflow_takes(name: str) -> None:
    _validate_metric_name(stored_name(name))


@pytest.mark.parametrize("name", ["loss", "nfe4/fd_pixels", "a.b-c d:e", "größe", "x_4", "_x_"])
def test_name_that_mlflow_takes_stays(name: str) -> None:
    assert stored_name(name) == name


def test_other_characters_become_their_codes() -> None:
    assert stored_name("AR@100") == "AR_x40_100"
    assert stored_name("AR_x40_100") == "AR_x5f_x40_100"
    assert stored_name("../up") == "_x2e_._x2f_up"


def test_no_two_names_become_one() -> None:
    found = {"".join(p) for n in range(6) for p in product("_x4/.@", repeat=n)}
    assert len({stored_name(name) for name in found}) == len(found)


def test_long_names_stay_apart() -> None:
    one, other = "a" * 300 + "1", "a" * 300 + "2"
    assert len(stored_name(one)) == MAX_NAME_LENGTH
    assert stored_name(one) != stored_name(other)
