"""From a set to batches: an endless sequence of samples, fixed by the seed and cut consecutively.

The sequence comes in blocks: a finite set's block e is its e-th epoch, a permutation drawn from
(seed, e); an endless set's block e is 4096 draws from (seed, e). Step k of batch size n takes the
places k n .. (k + 1) n - 1, across block borders. So a batch is a pure function of (step, n, seed):
a resume needs no loader state, every sample comes once per epoch, and every process of a run makes
the same global batch, of which it reads and computes its share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from benchmarks.data.image_pixels import PictureFiles
from registry.protocols import Cond, Share
from zoo.ops import like

T = TypeVar("T")

DRAWN_AT_ONCE = 4096  # samples in a block of an endless set


@dataclass(frozen=True)
class Pictures:
    """Pixels uint8 [n c h w] and labels int64 [n], indices of `classes` (empty without labels)."""

    pixels: Tensor | PictureFiles
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()


class StoredSet:
    """A finite set in memory: whole numbers from 0 to `top`, normalised to [-1, 1] on the fly."""

    name: ClassVar[str]
    top: ClassVar[int] = 255
    stored: Pictures
    flip: bool = False  # mirror half of the training samples left to right

    def load(self) -> Pictures:
        raise NotImplementedError

    def __post_init__(self) -> None:
        object.__setattr__(self, "stored", self.load())  # so that what is wrong shows up here

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.pixels.shape[1:])

    @property
    def size(self) -> int:
        return len(self.stored.pixels)

    @property
    def num_classes(self) -> int:
        return len(self.stored.classes)

    def identity(self) -> str:
        return self._identity

    @cached_property
    def _identity(self) -> str:
        pixels, labels = self.stored.pixels, self.stored.labels
        about = f"{self.name}: {self.size} x {self.shape}"
        if isinstance(pixels, PictureFiles):
            return f"{about}, sha256 of names and sizes {pixels.listing()}"
        return f"{about}, sha256 {content_hash(pixels, *([] if labels is None else [labels]))}"

    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        return self.batch_share(step, n, seed, Share())

    def batch_share(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        if isinstance(self.stored.pixels, PictureFiles):
            return read_ahead(self._read, step, n, seed, share)
        return self._read(step, n, seed, share)

    def _read(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        rows = places(self.size, step, n, seed)
        x0 = self.rows(*share.rows(rows))
        if self.flip:
            (mirrored,) = share.rows(flipped(self.size, step, n, seed))
            x0 = torch.where(like(mirrored, x0), x0.flip(-1), x0)
        return x0, self._cond(rows)

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        """A random subset without repetition; the first m of n are the reference of size m."""
        rows = subset(self.size, n, seed)
        return self.rows(rows), self._cond(rows)

    def sample_labels(self, n: int) -> Cond | None:
        """n labels with the frequencies of the data, evenly interleaved; None without labels."""
        if self.stored.labels is None:
            return None
        counts = torch.bincount(self.stored.labels, minlength=self.num_classes)
        return {"label": interleave(apportion(n, counts))}

    def rows(self, rows: Tensor) -> Tensor:
        """The samples with these indices, in [-1, 1], as they are stored."""
        return self.stored.pixels[rows].float() * (2 / self.top) - 1

    def _cond(self, rows: Tensor) -> Cond | None:
        return None if self.stored.labels is None else {"label": self.stored.labels[rows]}


def subset(size: int, n: int, seed: int) -> Tensor:
    """n different indices below size, or all; the first m of n are those for m."""
    return torch.randperm(size, generator=seeded("reference", size, seed))[:n]


def flipped(size: int, step: int, n: int, seed: int) -> Tensor:
    """Which samples of a step are mirrored: half of them, drawn anew in every epoch."""
    return cut(size, step * n, n, lambda epoch: _mirrored(size, seed, epoch))


@lru_cache(maxsize=4)
def _mirrored(size: int, seed: int, epoch: int) -> Tensor:
    return torch.rand(size, generator=seeded("flip", size, seed, epoch)) < 0.5


def places(size: int, step: int, n: int, seed: int) -> Tensor:
    """The indices that a step takes from a set of this size."""
    return cut(size, step * n, n, lambda epoch: _permutation(size, seed, epoch))


class EndlessSet:
    """A law to draw from without end or labels; hashable, since equal laws share their draws."""

    name: ClassVar[str]
    num_classes: ClassVar[int] = 0
    size: ClassVar[int] = 0

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        raise NotImplementedError

    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        return cut(DRAWN_AT_ONCE, step * n, n, lambda block: _drawn(self, seed, block)), None

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        """A fresh draw, independent of every training batch."""
        return self.draw(n, seeded("reference", seed)), None

    def sample_labels(self, n: int) -> Cond | None:
        return None


_reader = ThreadPoolExecutor(1, "read ahead")
_waiting: dict[Hashable, Future[Any]] = {}


def read_ahead(make: Callable[..., T], step: int, *how: Hashable) -> T:
    """make(step, *how), while make(step + 1, *how) begins in a thread of its own."""
    ready = _waiting.pop((make, step, *how), None)
    _waiting.clear()
    found = make(step, *how) if ready is None else ready.result()
    _waiting[make, step + 1, *how] = _reader.submit(make, step + 1, *how)
    return found


def cut(length: int, start: int, n: int, block: Callable[[int], Tensor]) -> Tensor:
    """Rows start .. start + n - 1 of block(0), block(1), ... end to end, each of `length` rows."""
    pieces = []
    for i in range(start // length, (start + n - 1) // length + 1):
        first = i * length
        pieces.append(block(i)[max(start - first, 0) : start + n - first])
    return torch.cat(pieces)  # a copy even of one piece, since blocks are remembered


def seeded(purpose: str, *key: int) -> torch.Generator:
    """A generator of its own for each purpose: data never share a stream with a run's noise."""
    digest = hashlib.sha256(f"objective-zoo data {purpose} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=seeded("epoch", size, seed, epoch))


@lru_cache(maxsize=4)
def _drawn(dataset: EndlessSet, seed: int, block: int) -> Tensor:
    return dataset.draw(DRAWN_AT_ONCE, seeded("block", seed, block))


def content_hash(*tensors: Tensor) -> str:
    """The first 16 hex digits of the SHA-256 of shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def apportion(n: int, counts: Tensor) -> Tensor:
    """n shared out in proportion to counts [k] by largest remainder; ties go to the lower index."""
    total = int(counts.sum())
    shares = n * counts // total
    by_remainder = torch.argsort(n * counts % total, descending=True, stable=True)
    shares[by_remainder[: n - int(shares.sum())]] += 1
    return shares


def interleave(counts: Tensor) -> Tensor:
    """counts[i] copies of each i, spread evenly, each i once first: (2, 2, 1) -> 0, 1, 2, 0, 1."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    nth = torch.arange(len(labels)) - (torch.cumsum(counts, 0) - counts)[labels]
    return labels[torch.argsort(nth.double() / counts[labels], stable=True)]
