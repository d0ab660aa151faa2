"""Groups of one label: frequencies and samples come out even, and nothing is remembered."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data.digits import Digits
from benchmarks.data.order.label_groups import LabelGroups
from benchmarks.data.order.places import places

labels = st.lists(st.integers(0, 4), min_size=1, max_size=25).map(torch.tensor)
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**32)


@settings(max_examples=60, deadline=None)
@given(labels=labels, group=sizes, num=st.integers(1, 8), step=st.integers(0, 9), seed=seeds)
def test_rows_of_a_group_have_one_label(labels, group, num, step, seed):
    rows = LabelGroups(labels).places(step, num * group, seed, group)
    found = labels[rows].view(num, group)
    assert (found == found[:, :1]).all()


def test_rows_of_the_plain_sequence_have_several():
    labels = torch.arange(20) % 4
    found = labels[places(20, 0, 20, 0)].view(-1, 4)
    assert (found != found[:, :1]).any()


@settings(max_examples=40, deadline=None)
@given(labels=labels, group=sizes, epoch=st.integers(0, 2), seed=seeds)
def test_epoch_of_groups_has_each_label_and_each_sample_equally_often(labels, group, epoch, seed):
    n = len(labels) * group
    rows = LabelGroups(labels).places(epoch, n, seed, group)
    assert Counter(labels[rows[::group]].tolist()) == Counter(labels.tolist())
    assert Counter(rows.tolist()) == dict.fromkeys(range(len(labels)), group)


@settings(max_examples=40, deadline=None)
@given(labels=labels, group=sizes, seed=seeds)
def test_no_sample_comes_again_before_all_of_its_label_have_come(labels, group, seed):
    rows = LabelGroups(labels).places(0, 2 * len(labels) * group, seed, group)
    for label in labels.unique().tolist():
        mine = rows[labels[rows] == label]
        count = int((labels == label).sum())
        for turn in mine.split(count):
            assert len(set(turn.tolist())) == len(turn)


@settings(max_examples=40, deadline=None)
@given(labels=labels, group=sizes, num=st.integers(1, 5), step=st.integers(0, 9), seed=seeds)
def test_groups_depend_on_their_places_alone(labels, group, num, step, seed):
    """Twice as many at step k are those of steps 2k and 2k + 1, asked in any order."""
    groups, n = LabelGroups(labels), num * group
    whole = groups.places(step, 2 * n, seed, group)
    second = LabelGroups(labels).places(2 * step + 1, n, seed, group)
    first = groups.places(2 * step, n, seed, group)
    assert torch.equal(whole, torch.cat([first, second]))


def test_orders_differ_between_seeds_and_labels_and_rounds():
    labels = torch.arange(40) % 2
    groups = LabelGroups(labels)
    rows = groups.places(0, 40 * 8, 0, 8)
    assert not torch.equal(rows, groups.places(0, 40 * 8, 1, 8))
    even, odd = rows[labels[rows] == 0], rows[labels[rows] == 1]
    assert not torch.equal(even[:20] // 2, odd[:20] // 2)
    assert not torch.equal(even[:20], even[20:40])
    later = groups.places(1, 40 * 8, 0, 8)  # the next epoch of groups
    assert not torch.equal(later[labels[later] == 0], even)


def test_groups_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match="10 rows are not made of whole groups of 4 rows of one"):
        Digits().batch(0, 10, 0, same_label=4)
