"""Objectives that compare the rows of a group: right ones pass, and a wrong size is rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from benchmarks.conformance.isolation import rows_are_independent, share_of_a_batch
from benchmarks.conformance.subject import Subject
from registry.protocols import Batch, LossOutput, Network
from zoo.ops import mean_flat, normal_like


@dataclass(frozen=True, kw_only=True)
class ComparesFour:
    """Each row's error has the mean of its four rows in it."""

    heads: ClassVar = ("u",)
    group: ClassVar = 4

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        x1, t = normal_like(batch.x0, rng), torch.rand(len(batch), generator=rng)
        x0, x1, t, cond = batch.share.rows(batch.x0, x1, t, batch.cond)
        error = net(x1, t, 0 * t, cond)["u"] - x0
        mean = torch.cat([rows.mean(0).expand_as(rows) for rows in error.split(4)])
        return LossOutput(per_sample=mean_flat((error + mean) ** 2))


class SaysTwo(ComparesFour):
    group: ClassVar = 2


class SaysNothing(ComparesFour):
    group: ClassVar = 1


class SaysMany(ComparesFour):
    group: ClassVar = 64


@pytest.mark.parametrize("cls", [ComparesFour, SaysMany])
def test_rows_may_depend_on_those_of_their_group(cls) -> None:
    subject = Subject("own", cls)
    for claim in (rows_are_independent, share_of_a_batch):
        assert claim(subject).status == "ok"


@pytest.mark.parametrize("cls", [SaysTwo, SaysNothing])
def test_rows_that_depend_on_those_of_another_group_are_rejected(cls) -> None:
    subject = Subject("own", cls)
    found = rows_are_independent(subject)
    assert found.status == "FAIL"
    assert "declare couples_rows = True" in found.hint
    assert "group = k" in found.hint
