"""How a data set becomes batches: the seed fixes an endless sequence, and each step takes a piece.

The sequence is made of blocks. Block e of a finite set is its epoch e: all its samples, in an order
that is drawn from (seed, e). Block e of an endless set is 4096 draws from (seed, e). With a batch
size of n, step k takes the places k n .. (k + 1) n - 1 of the sequence, across the ends of blocks.

So a batch is a function of (step, n, seed) and of nothing else. A run that is resumed needs no
state of a loader, and every sample comes once in each epoch. All processes of a run agree on the
batch, of which each reads and computes its share. Batches of groups that have one label each take
places of another sequence (benchmarks/data/order/label_groups.py), in the same manner.

Batches are float32 [n ...], pictures in [-1, 1]; labels are cond["label"], int64 [n].
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from benchmarks.data.image_pixels import PictureFiles
from benchmarks.data.order.label_groups import LabelGroups
from benchmarks.data.order.places import apportion as apportion
from benchmarks.data.order.places import cut as cut
from benchmarks.data.order.places import flipped as flipped
from benchmarks.data.order.places import interleave as interleave
from benchmarks.data.order.places import places as places
from benchmarks.data.order.places import seeded as seeded
from benchmarks.data.order.places import subset as subset
from registry.protocols import Cond, Share
from zoo.ops import like

T = TypeVar("T")

DRAWN_AT_ONCE = 4096  # samples in a block of an endless set

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """The pictures of a finite set, with their labels if there are any."""

    pixels: Tensor | PictureFiles  # uint8 [n c h w]
    labels: Tensor | None = None  # int64 [n], indices into `classes`
    classes: tuple[str, ...] = ()  # names; empty without labels


class StoredSet:
    """A finite set of pictures, stored as whole numbers from 0 to `top` and given in [-1, 1]."""

    name: ClassVar[str]
    rule: ClassVar[str] = ""  # by which pictures were cut, for sets that cut them
    top: ClassVar[int] = 255
    groups_by_label: ClassVar[bool] = True
    stored: Pictures
    flip: bool = False  # mirror half of the training samples left to right

    def load(self) -> Pictures:
        """The pictures; called once, when the data set is made."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        object.__setattr__(self, "stored", self.load())  # here, so that no run starts without data
        _check_labels(self.name, self.stored)

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
        about += f", {self.rule}" if self.rule else ""
        if isinstance(pixels, PictureFiles):
            return f"{about}, sha256 of names and sizes {pixels.listing()}"
        return f"{about}, sha256 {content_hash(pixels, *([] if labels is None else [labels]))}"

    def batch(
        self, step: int, n: int, seed: int, same_label: int = 1
    ) -> tuple[Tensor, Cond | None]:
        return self.batch_share(step, n, seed, Share(group=same_label))

    def batch_share(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        if isinstance(self.stored.pixels, PictureFiles):
            return read_ahead(self._read, step, n, seed, share)
        return self._read(step, n, seed, share)

    def _read(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        rows = self._places(step, n, seed, share.group)
        x0 = self.rows(*share.rows(rows))
        if self.flip:
            (mirrored,) = share.rows(flipped(self.size, step, n, seed))
            x0 = torch.where(like(mirrored, x0), x0.flip(-1), x0)
        return x0, self._cond(rows)

    def _places(self, step: int, n: int, seed: int, group: int) -> Tensor:
        if group == 1 or self.stored.labels is None:
            return places(self.size, step, n, seed)
        return self._label_groups.places(step, n, seed, group)

    @cached_property
    def _label_groups(self) -> LabelGroups:
        assert self.stored.labels is not None
        return LabelGroups(self.stored.labels)

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        """A random subset of n different samples, or all samples if there are no more than n."""
        rows = subset(self.size, n, seed)
        return self.rows(rows), self._cond(rows)

    def sample_labels(self, n: int) -> Cond | None:
        """n labels, each as often as in the data and evenly mixed; None without labels."""
        if self.stored.labels is None:
            return None
        counts = torch.bincount(self.stored.labels, minlength=self.num_classes)
        return {"label": interleave(apportion(n, counts))}

    def rows(self, rows: Tensor) -> Tensor:
        """The samples with these indices, in [-1, 1], none of them mirrored."""
        return self.stored.pixels[rows].float() * (2 / self.top) - 1

    def _cond(self, rows: Tensor) -> Cond | None:
        return None if self.stored.labels is None else {"label": self.stored.labels[rows]}


def _check_labels(name: str, stored: Pictures) -> None:
    """ValueError for labels that do not fit pictures and classes; a warning of empty classes."""
    labels, classes, num = stored.labels, stored.classes, len(stored.pixels)
    if labels is None:
        return
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if len(labels) != num or low < 0 or high >= len(classes):
        raise ValueError(
            f"{name} has {len(labels)} labels from {low} to {high} for {num} pictures of "
            f"{len(classes)} classes: there must be one label for each picture, from 0 to "
            f"{len(classes) - 1}"
        )
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    if empty := [classes[i] for i, count in enumerate(counts) if not count]:
        shown = ", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if empty[10:] else "")
        log.warning(
            "%s: %d of %d classes have no picture and cannot be learned: %s",
            *(name, len(empty), len(classes), shown),
        )


class EndlessSet:
    """A probability law that is drawn from without end; there are no labels.

    It must be hashable: it is the key of a cache of the last draws, which equal laws share.
    """

    name: ClassVar[str]
    num_classes: ClassVar[int] = 0
    size: ClassVar[int] = 0

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        """n independent samples [n ...]."""
        raise NotImplementedError

    def batch(self, step: int, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        return cut(DRAWN_AT_ONCE, step * n, n, lambda block: _drawn(self, seed, block)), None

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        """n samples that are independent of every training batch."""
        return self.draw(n, seeded("reference", seed)), None

    def sample_labels(self, n: int) -> Cond | None:
        return None


_reader = ThreadPoolExecutor(1, "read ahead")
_waiting: dict[Hashable, Future[Any]] = {}


def read_ahead(make: Callable[..., T], step: int, *how: Hashable) -> T:
    """The value of make(step, *how); a thread begins to make that of step + 1 meanwhile."""
    ready = _waiting.pop((make, step, *how), None)
    _waiting.clear()
    found = make(step, *how) if ready is None else ready.result()
    _waiting[make, step + 1, *how] = _reader.submit(make, step + 1, *how)
    return found


@lru_cache(maxsize=4)
def _drawn(dataset: EndlessSet, seed: int, block: int) -> Tensor:
    return dataset.draw(DRAWN_AT_ONCE, seeded("block", seed, block))


def content_hash(*tensors: Tensor) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the tensors' shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
