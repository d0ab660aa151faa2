"""Random streams by (seed, rank, step): every step is reseeded, so a resume needs no RNG state.

`rank` counts the equal shares of a global batch. Processes and micro-batches of gradient
accumulation are counted alike, so four micro-batches in one process have the dropout masks of four
processes. Objectives draw for the whole batch, from the stream of rank 0.

torch's CPU generator keeps only the low 32 bits of a seed, and 32 random bits collide after some
ten thousand steps. Here the low word is a keyed permutation of (step, rank): no two streams of one
seed coincide for ranks below 1024 and steps below 4 million. The high word, which CUDA reads too,
is a hash.
The mixers are the finalisers of SplitMix64 (Steele et al., 2014) and MurmurHash3 (Appleby).
"""

from __future__ import annotations

import torch

_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1
_NOISE, _DROPOUT = 1, 2  # what a stream is for


def generator(
    seed: int, rank: int, step: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator for all draws of an objective at this step."""
    return torch.Generator(device).manual_seed(stream(seed, rank, step, _NOISE))


def seed_dropout(seed: int, rank: int, step: int, device: torch.device | str = "cpu") -> None:
    """Seed the device's global generator, the only one that dropout reads."""
    word = stream(seed, rank, step, _DROPOUT)
    if torch.device(device).type == "cpu":
        torch.default_generator.manual_seed(word)
    else:
        torch.manual_seed(word)  # every device; 0.1 ms


def stream(seed: int, rank: int, step: int, purpose: int = 0) -> int:
    """The 64-bit seed of one stream."""
    key = _mix64(_mix64(seed & _MASK64) ^ purpose)
    low = _mix32(_mix32(((step << 10) + rank & _MASK32) ^ (key & _MASK32)) ^ (key >> 32))
    high = _mix64(key ^ _mix64((rank << 40) + step & _MASK64)) & _MASK32
    return high << 32 | low


def _mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK64
    return x ^ x >> 31


def _mix32(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B & _MASK32
    x = (x ^ x >> 13) * 0xC2B2AE35 & _MASK32
    return x ^ x >> 16
