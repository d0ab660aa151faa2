"""How batches are cut from a set: nothing lost, nothing repeated, nothing remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.data.mixtures import Mixture
from benchmarks.data.streams import (
    Pictures,
    StoredSet,
    apportion,
    cut,
    interleave,
    read_ahead,
    seeded,
)


@dataclass(frozen=True, kw_only=True)
class Numbered(StoredSet):
    """Sample i is the pixel i, with label i % 3 (up to 256 samples)."""

    name: ClassVar = "numbered"
    n: int

    def load(self) -> Pictures:
        numbers = torch.arange(self.n)
        return Pictures(numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers % 3, ("a", "b", "c"))


def numbers(x0: torch.Tensor) -> list[int]:
    return ((x0 + 1) * 127.5).round().int().flatten().tolist()


sizes = st.integers(1, 40)
counts = st.integers(1, 100)


@given(size=sizes, n=counts, seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_stream_shows_every_sample_once_per_epoch(size, n, seed, epochs):
    dataset = Numbered(n=size)
    steps = -(-epochs * size // n)
    seen = [i for step in range(steps) for i in numbers(dataset.batch(step, n, seed)[0])]
    assert len(seen) == steps * n
    for epoch in range(epochs):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(size=sizes, n=counts, step=st.integers(0, 50), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_stored_batch_depends_on_places_alone(size, n, step, seed):
    """Twice n at step k is n at steps 2k and 2k+1: what ranks or accumulation rely on."""
    dataset = Numbered(n=size)
    whole, cond = dataset.batch(step, 2 * n, seed)
    halves = [dataset.batch(2 * step + i, n, seed) for i in (0, 1)]
    assert torch.equal(whole, torch.cat([x0 for x0, _ in halves]))
    assert torch.equal(cond["label"], torch.cat([half["label"] for _, half in halves]))


@given(n=st.integers(1, 5000), step=st.integers(0, 50), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_endless_batch_depends_on_places_alone(n, step, seed):
    mixture = Mixture()
    whole, cond = mixture.batch(step, 2 * n, seed)
    assert whole.shape == (2 * n, 2)
    assert cond is None
    halves = [mixture.batch(2 * step + i, n, seed)[0] for i in (0, 1)]
    assert torch.equal(whole, torch.cat(halves))


@given(steps=st.lists(st.integers(0, 30), min_size=2, max_size=6), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_batch_is_pure_in_any_order_of_calls(steps, seed):
    dataset = Numbered(n=7)
    forward = {step: numbers(dataset.batch(step, 5, seed)[0]) for step in steps}
    dataset.batch(0, 5, seed + 1)
    for step in reversed(steps):
        assert numbers(dataset.batch(step, 5, seed)[0]) == forward[step]


@pytest.mark.parametrize("dataset", [Numbered(n=50), Mixture()], ids=lambda d: d.name)
def test_batch_survives_what_its_user_writes_into_it(dataset):
    before = dataset.batch(0, 8, 0)[0].clone()
    dataset.batch(0, 8, 0)[0].fill_(9.0)
    assert torch.equal(dataset.batch(0, 8, 0)[0], before)


def test_stream_differs_between_seeds_and_epochs():
    dataset = Numbered(n=40)
    first, second, other = (
        numbers(dataset.batch(step, 40, seed)[0]) for step, seed in [(0, 0), (1, 0), (0, 1)]
    )
    assert first != second
    assert first != other


def test_labels_stay_with_their_samples():
    x0, cond = Numbered(n=40).batch(3, 64, 5)
    assert cond["label"].dtype == torch.int64
    assert [i % 3 for i in numbers(x0)] == cond["label"].tolist()


@given(size=sizes, n=counts, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_reference_is_a_subset_without_repetition_and_nested(size, n, seed):
    dataset = Numbered(n=size)
    seen = numbers(dataset.reference(n, seed)[0])
    assert len(seen) == len(set(seen)) == min(n, size)
    assert numbers(dataset.reference(2 * n, seed)[0])[: len(seen)] == seen


def test_reference_does_not_follow_the_training_order():
    dataset = Numbered(n=40)
    assert numbers(dataset.reference(40, 0)[0]) != numbers(dataset.batch(0, 40, 0)[0])
    assert not torch.equal(Mixture().reference(40, 0)[0], Mixture().batch(0, 40, 0)[0])


def test_seeded_keeps_purposes_apart():
    draws = {
        torch.rand((), generator=seeded(purpose, *key)).item()
        for purpose, key in [("epoch", (1, 23)), ("epoch", (12, 3)), ("block", (1, 23))]
    }
    assert len(draws) == 3


@given(length=st.integers(1, 9), start=st.integers(0, 40), n=st.integers(1, 40))
def test_cut_is_a_slice_of_the_blocks_end_to_end(length, start, n):
    rows = cut(length, start, n, lambda i: torch.arange(i * length, (i + 1) * length))
    assert rows.tolist() == list(range(start, start + n))


@given(
    n=st.integers(0, 500), counts=st.lists(st.integers(0, 99), min_size=1, max_size=9).filter(any)
)
def test_apportion_is_exact_and_within_one_of_the_quota(n, counts):
    shares = apportion(n, torch.tensor(counts)).tolist()
    assert sum(shares) == n
    for share, count in zip(shares, counts, strict=True):
        assert abs(share - n * count / sum(counts)) < 1


def test_apportion_favours_the_largest_remainder_then_the_lower_index():
    assert apportion(10, torch.tensor([47, 16, 37])).tolist() == [5, 1, 4]  # 4.7, 1.6, 3.7
    assert apportion(1, torch.tensor([5, 5])).tolist() == [1, 0]


def test_interleave_spreads_labels_evenly():
    assert interleave(torch.tensor([2, 2, 1])).tolist() == [0, 1, 2, 0, 1]
    assert interleave(torch.tensor([4, 0, 2])).tolist() == [0, 2, 0, 0, 2, 0]


def test_sample_labels_follow_the_data():
    labels = Numbered(n=4).sample_labels(8)["label"]  # the classes hold 2, 1 and 1 samples
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [4, 2, 2]
    assert labels[:3].tolist() == [0, 1, 2]
    assert Mixture().sample_labels(8) is None


def test_identity_follows_pixels_and_labels():
    @dataclass(frozen=True, kw_only=True)
    class Given(StoredSet):
        name: ClassVar = "given"
        pixels: tuple[int, ...]
        labels: tuple[int, ...]

        def load(self) -> Pictures:
            pixels = torch.tensor(self.pixels, dtype=torch.uint8).view(-1, 1, 1, 1)
            return Pictures(pixels, torch.tensor(self.labels), ("a", "b"))

    one = Given(pixels=(1, 2), labels=(0, 1)).identity()
    assert one.startswith("given: 2 x (1, 1, 1), sha256 ")
    assert one == Given(pixels=(1, 2), labels=(0, 1)).identity()
    assert one != Given(pixels=(1, 3), labels=(0, 1)).identity()
    assert one != Given(pixels=(1, 2), labels=(1, 0)).identity()


def test_reading_ahead_gives_what_was_asked_for_and_makes_each_step_once():
    made = []

    def make(step: int, n: int, seed: int) -> tuple[int, int, int]:
        made.append((step, n, seed))
        if step == 7:
            raise ValueError("no step 7")
        return step, n, seed

    assert [read_ahead(make, step, 4, 0) for step in (0, 1, 2)] == [(k, 4, 0) for k in (0, 1, 2)]
    assert read_ahead(make, 9, 4, 0) == (9, 4, 0)  # not the one that was made ready
    assert read_ahead(make, 10, 4, 1) == (10, 4, 1)
    assert read_ahead(make, 6, 4, 1) == (6, 4, 1)
    with pytest.raises(ValueError, match="no step 7"):
        read_ahead(make, 7, 4, 1)
    asked = [(0, 4, 0), (1, 4, 0), (2, 4, 0), (9, 4, 0), (10, 4, 1), (6, 4, 1), (7, 4, 1)]
    assert [step for step in made if step in asked] == asked


def test_labels_must_fit_pictures_and_classes(caplog):
    for labels, classes in (((0, 1, 2), 2), ((0, -1, 1), 2), ((0, 1), 2)):
        with pytest.raises(ValueError, match="one label for each picture, from 0 to 1"):
            Labelled(labels=labels, num=classes)
    assert caplog.text == ""
    Labelled(labels=(0, 0, 2), num=4)
    assert "2 of 4 classes have no picture and cannot be learned: c1, c3" in caplog.text


@dataclass(frozen=True, kw_only=True)
class Labelled(StoredSet):
    """Three pictures, with these labels of this many classes."""

    name = "labelled"
    labels: tuple[int, ...]
    num: int

    def load(self) -> Pictures:
        classes = tuple(f"c{i}" for i in range(self.num))
        return Pictures(torch.zeros(3, 1, 2, 2).byte(), torch.tensor(self.labels), classes)
