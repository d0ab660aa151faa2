"""Shares of a batch: the same noise, times, labels and quotas however many shares there are."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from varied_objectives import OBJECTIVES

import registry
from benchmarks.conformance.networks import Tapped, Toy
from benchmarks.conformance.subject import random_batch
from registry.protocols import Share, group_of, required_heads
from zoo.derivatives.one_pass import apart


@given(n=st.integers(0, 40), count=st.integers(1, 9), quota=st.integers(0, 40))
def test_shares_cover_the_batch_once_and_keep_first_rows_first(n, count, quota):
    rows, quota = torch.arange(n), min(quota, n)
    shares = [Share(number, count) for number in range(count)]
    cut = [share.rows(rows)[0] for share in shares]
    assert sorted(torch.cat(cut).tolist()) == rows.tolist()
    for share, mine in zip(shares, cut, strict=True):
        assert len(mine) == share.size(n)
        assert (mine < quota).tolist() == [i < share.size(quota) for i in range(len(mine))]


@given(
    groups=st.integers(0, 12), group=st.integers(1, 5), count=st.integers(1, 5), quota=st.integers()
)
def test_shares_have_whole_groups_once_and_know_their_places(groups, group, count, quota):
    n = groups * group
    rows, quota = torch.arange(n), quota % (n + 1)
    whole = torch.full((n,), -1)
    for number in range(count):
        share = Share(number, count, group=group)
        (mine,) = share.rows(rows)
        assert len(mine) == share.size(n)
        assert [share.place(i) for i in range(len(mine))] == mine.tolist()
        assert (mine < quota).tolist() == [i < share.size(quota) for i in range(len(mine))]
        assert all(len(set(g)) == 1 for g in (mine // group).view(-1, group).tolist())
        share.write(mine, whole)
    assert torch.equal(whole, rows)


def test_share_of_groups_of_one_row_is_the_plain_share():
    rows = torch.arange(24).view(12, 2)
    for number in (0, 1, 2):
        assert torch.equal(Share(number, 3, group=1).rows(rows)[0], rows[number::3])
    t, cond, nothing = Share(1, 2, group=2).rows(torch.arange(8), {"label": torch.arange(8)}, None)
    assert t.tolist() == cond["label"].tolist() == [2, 3, 6, 7]
    assert nothing is None


def test_share_cuts_conditions_and_passes_none_on():
    t, cond, nothing = Share(1, 2).rows(torch.arange(4), {"label": torch.arange(4)}, None)
    assert t.tolist() == cond["label"].tolist() == [1, 3]
    assert nothing is None


def test_every_objective_is_shared_here():
    ours = {
        name
        for name in registry.objectives.names()
        if registry.objectives.get(name).__module__.startswith("zoo.")  # not those of other tests
    }
    assert ours <= set(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=8)
@given(count=st.sampled_from((2, 3, 4, 6)), step=st.integers(0, 3), seed=st.integers(0, 99))
def test_shares_have_the_rows_and_the_gradient_of_the_whole_batch(name, count, step, seed):
    objective = OBJECTIVES[name]
    if count % 2:  # in a pass of its own, which sharded weights need in every process or in none
        objective = apart(objective)
    net = Toy((2,), required_heads(objective))
    group = group_of(objective)
    batch = random_batch((2,), 12 * group, labels="given", step=step, seed=seed, group=group)

    def loss(share: Share) -> tuple[Tensor, Tensor, int]:
        tapped = Tapped(net, len(batch))
        rng = torch.Generator().manual_seed(seed)
        fresh = deepcopy(objective)  # its teacher serves one loss without weights of its own
        out = fresh.loss(tapped, replace(batch, share=share), rng)
        gradient = torch.autograd.grad(
            out.per_sample.mean(), list(net.parameters()), materialize_grads=True, allow_unused=True
        )
        return (
            out.per_sample.detach(),
            torch.cat([g.flatten() for g in gradient]),
            len(tapped.calls),
        )

    rows, gradient, calls = loss(Share())
    parts = [loss(Share(number, count, group)) for number in range(count)]
    # the same float32 arithmetic on fewer rows at a time
    torch.testing.assert_close(
        torch.stack([part[0].unflatten(0, (-1, group)) for part in parts], 1).flatten(),
        rows,
        rtol=1e-4,
        atol=1e-5,
    )
    mean = torch.stack([part[1] for part in parts]).mean(0)
    torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    if count % 2:
        assert {part[2] for part in parts} == {calls}
