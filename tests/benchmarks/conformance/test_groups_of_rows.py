"""Objectives that compare the rows of a group: right ones pass, and a wrong size is rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from benchmarks.conformance.claims import few_rows
from benchmarks.conformance.expected import moments
from benchmarks.conformance.fixed_point import at_gaussian, at_mixture
from benchmarks.conformance.gradients import not_through_targets
from benchmarks.conformance.isolation import rows_are_independent, share_of_a_batch
from benchmarks.conformance.networks import WithMoments
from benchmarks.conformance.report import CLAIMS, SLOW
from benchmarks.conformance.results import Broken, run_claim
from benchmarks.conformance.subject import GAUSSIAN, MIXTURE, Subject, law_batch, random_batch
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


@dataclass(frozen=True, kw_only=True)
class ComparesLaws:
    """Energy distance between samples of one step and data, in groups of eight rows."""

    heads: ClassVar = ("u",)
    trains: ClassVar = ("law",)
    fixed_point: ClassVar = "distribution"
    group: ClassVar = 8
    others: ClassVar = 7

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        x1, one = normal_like(batch.x0, rng), torch.ones(len(batch))
        x0, x1, one, cond = batch.share.rows(batch.x0, x1, one, batch.cond)
        x = x1 - net(x1, one, 0 * one, cond)["u"].reshape(x1.shape)
        fake, real = (rows.flatten(1).unflatten(0, (-1, self.group)) for rows in (x, x0))
        apart = torch.cdist(fake, fake).sum(2) / self.others / 2
        return LossOutput(per_sample=(torch.cdist(fake, real).mean(2) - apart).flatten())


class CountsItself(ComparesLaws):
    others: ClassVar = 8


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


def test_rows_of_a_group_have_one_label_and_groups_are_whole() -> None:
    for batch in (random_batch(n=12, labels="given", group=8), law_batch(MIXTURE, 12, 0, group=8)):
        assert len(batch) == 16
        labels = batch.cond["label"].view(2, 8)
        assert labels.eq(labels[:, :1]).all()
    assert len(law_batch(GAUSSIAN, 12, 0, group=8)) == 16
    shares = law_batch(MIXTURE, 8000, 0, group=8).cond["label"].double().mean()
    assert abs(float(shares) - 0.2) < 0.02  # as often as in the law


@pytest.mark.parametrize(
    "claim",
    [few_rows, not_through_targets, at_gaussian, pytest.param(at_mixture, marks=pytest.mark.slow)],
)
def test_laws_that_are_compared_in_groups_pass(claim) -> None:
    """With labels at the mixture; the gradient through two rows of a group is meant."""
    found = claim(Subject("own", ComparesLaws))
    assert found.status == "ok", found.reason


def test_a_row_that_is_compared_with_itself_is_rejected() -> None:
    found = at_gaussian(Subject("own", CountsItself))
    assert found.status == "FAIL"
    assert "leave out the pairs of a row with itself" in found.hint


def test_a_gradient_through_rows_of_another_group_is_rejected() -> None:
    assert not_through_targets(Subject("own", ComparesFour)).status == "ok"
    with pytest.raises(Broken, match="runs through two rows of call 1"):
        not_through_targets(Subject("own", SaysTwo))


@pytest.mark.parametrize(("group", "couples"), [(1, False), (3, False), (64, False), (1, True)])
def test_blocks_of_the_mixture_are_whole_groups_of_one_batch(group, couples) -> None:
    """Unless a row's loss depends on rows of other groups: then each is a batch of its own."""
    given = []

    class Counts(ComparesFour):
        def loss(self, net, batch, rng):
            given.append(len(batch))
            return LossOutput(per_sample=torch.arange(len(batch)) // group)

    Counts.group, Counts.couples_rows = group, couples
    subject = Subject("own", Counts)
    probe = WithMoments(subject.exact_network(MIXTURE), 2, ("u",))
    blocks = [*moments._blocks(0, subject, MIXTURE, True, probe, 128, range(5, 9))]
    size = -(-128 // group) * group
    assert given == ([128] * 4 if couples else [4 * size])
    assert [len(out.per_sample) for out in blocks] == [size] * 4
    for out in blocks:
        assert out.per_sample.unique(return_counts=True)[1].eq(group).all()


STATISTICAL = (*SLOW, "fixed point at a Gaussian", "errors are pulled back")


@pytest.mark.parametrize("size", [3, 12, 64, 200])
def test_every_claim_gives_whole_groups(size) -> None:
    """Also where the number of rows that a claim asks for is no multiple of the group."""

    class Whole(ComparesLaws):
        group, others = size, size - 1

        def loss(self, net, batch, rng):
            assert len(batch) % size == 0
            if batch.cond:
                label = batch.cond["label"].view(-1, size)
                assert label.eq(label[:, :1]).all()
            assert len(batch.share.rows(batch.x0)[0]) % size == 0
            return super().loss(net, batch, rng)

    for name, claim in CLAIMS.items():
        if name not in STATISTICAL or (size == 12 and name not in SLOW):
            found = run_claim(name, claim, Subject("own", Whole))
            assert found.status != "FAIL", found


@pytest.mark.parametrize("size", [12, 64])
def test_a_gradient_through_rows_of_another_large_group_is_rejected(size) -> None:
    class Beyond(ComparesLaws):
        """Pairs of two groups, where it declares one."""

        group, others = size, 2 * size - 1

        def loss(self, net, batch, rng):
            if len(batch) % (2 * size):
                return super().loss(net, batch, rng)
            both = type("Both", (ComparesLaws,), {"group": 2 * size, "others": self.others})()
            return both.loss(net, batch, rng)

    with pytest.raises(Broken, match="runs through two rows of call 1"):
        not_through_targets(Subject("own", Beyond))
