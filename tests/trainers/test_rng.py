"""Streams of random numbers: apart from each other, and the same again."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.rng import generator, seed_dropout, stream

GIN = Path(__file__).parents[2] / "gin"
CPU = torch.device("cpu")


def test_stream_has_no_collision_in_the_bits_that_torch_keeps() -> None:
    words = {stream(7, rank, step) & 0xFFFFFFFF for rank in range(64) for step in range(4000)}
    assert len(words) == 64 * 4000  # at random there would be about 7.6 collisions


@given(seed=st.integers(-(2**63), 2**63 - 1), rank=st.integers(0, 1022), step=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_stream_changes_half_its_bits_between_neighbours(seed: int, rank: int, step: int) -> None:
    here = stream(seed, rank, step)
    for other in (stream(seed + 1, rank, step), stream(seed, rank + 1, step)):
        for shift in (0, 32):
            flipped = ((here ^ other) >> shift & 0xFFFFFFFF).bit_count()
            assert 1 <= flipped <= 31  # 16 +- 2.8; 0 and 32 are 5.7 standard deviations away


def test_stream_flips_each_bit_half_of_the_time() -> None:
    n = 4000
    for a, b in (((0, 1), (0, 0)), ((1, 0), (0, 0)), ((0, 1), (1, 0))):
        flips = [stream(3, a[0], s + a[1], 1) ^ stream(3, b[0], s + b[1], 1) for s in range(n)]
        for bit in range(64):
            share = sum(word >> bit & 1 for word in flips) / n
            assert abs(share - 0.5) < 5 * 0.5 / n**0.5, (a, b, bit)  # 5 standard errors


def test_generator_noise_is_uncorrelated_between_neighbours() -> None:
    n = 1 << 14
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)]
    noise = torch.stack([torch.randn(n, generator=generator(*place)) for place in places])
    correlation = torch.corrcoef(noise) - torch.eye(len(places))
    assert correlation.abs().max() < 5 / n**0.5


def test_dropout_stream_is_not_the_noise_stream() -> None:
    seed_dropout(0, 0, 0)
    dropout = torch.rand(8)
    assert not torch.equal(dropout, torch.rand(8, generator=generator(0, 0, 0)))
    seed_dropout(0, 0, 0)
    assert torch.equal(dropout, torch.rand(8))
