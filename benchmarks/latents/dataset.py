"""The data set `latents`: samples from the posteriors that `objective-zoo encode` wrote.

A batch is (latent - shift) scale [n k h w], float32, with the constants of the manifest; `decode`
turns it back into latents and these into pixels in [-1, 1].

A sample of a posterior, and the choice of the mirrored copy, depend only on the seed and on the
place in the endless sequence of benchmarks/data/streams.py. They do not depend on the number of
processes that share a batch, or on what was read before. A process reads and draws only the rows of
its share, and copies them straight out of the page cache.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.order.label_groups import LabelGroups
from benchmarks.data.streams import (
    apportion,
    flipped,
    interleave,
    places,
    read_ahead,
    seeded,
    subset,
)
from benchmarks.latents.codes import Codes, same_vae
from benchmarks.latents.manifest_checks import CONSTANTS, check_constants, load_manifest
from benchmarks.latents.shard_encoder import PREPROCESSING
from benchmarks.latents.shards import LOGVAR_RANGE, Manifest, open_shards
from registry import datasets
from registry.protocols import Cond, Share, Vae

log = logging.getLogger(__name__)


@datasets.register("latents")
@dataclass(frozen=True, kw_only=True)
class Latents:
    """A folder of latents; they are decoded to pixels for people and for metrics."""

    name: ClassVar = "latents"
    groups_by_label: ClassVar = True
    local_paths: ClassVar = ("folder",)

    folder: str
    flip: bool = True  # take half of the training samples from the mirrored pictures
    sample: bool = True  # draw from the posterior; False takes its mean
    vae: Vae | None = None  # None takes the one that the manifest names
    decode_batch: int = 8  # latents that are decoded at a time
    verify: bool = False  # read and hash every shard at the start
    manifest: Manifest = field(init=False, repr=False, compare=False)
    codes: Codes = field(init=False, repr=False, compare=False)
    _rows: dict[str, list[np.ndarray]] = field(init=False, repr=False, compare=False)
    _labels: Tensor | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        folder = Path(self.folder).expanduser()
        object.__setattr__(self, "manifest", load_manifest(folder))
        if self.flip and not self.manifest.plan["flips"]:
            raise ValueError(
                f"{folder} was encoded without mirrored pictures; bind latents.flip = False, or "
                "encode it again with them"
            )
        shards = open_shards(folder, self.manifest, content=self.verify)
        rows = {
            name: [shard[name].numpy() for shard in shards]
            for name in ("posterior", *(["posterior_flipped"] if self.flip else []))
        }
        labels = torch.cat([shard["label"] for shard in shards]) if self.num_classes else None
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_labels", labels)
        vae = same_vae(self.manifest.plan["vae"], f"the latents in {self.folder}", self.vae)
        if self.manifest.plan.get("normalise") == CONSTANTS:
            constants = vae.constants(self.shape[0])
            check_constants(self.manifest, *constants, "the constants of its VAE")
        codes = Codes(
            scale=self.manifest.scale,
            shift=self.manifest.shift,
            vae=vae,
            decode_batch=self.decode_batch,
        )
        object.__setattr__(self, "codes", codes)
        if (rule := self.manifest.plan.get("preprocessing", PREPROCESSING)) != PREPROCESSING:
            log.warning(
                "the latents in %s were encoded by another rule than today's, so that they are "
                "latents of other pixels. To have today's, encode the pictures into a new folder"
                "\n  then  %s\n  now   %s",
                *(folder, rule, PREPROCESSING),
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.manifest.shape

    @property
    def num_classes(self) -> int:
        return len(self.manifest.plan["classes"])

    @property
    def size(self) -> int:
        return self.manifest.num

    def identity(self) -> str:
        how = "posterior samples" if self.sample else "posterior means"
        return f"latents: {self.size} x {self.shape}, {how}, sha256 {self.manifest.identity()}"

    def batch(
        self, step: int, n: int, seed: int, same_label: int = 1
    ) -> tuple[Tensor, Cond | None]:
        return self.batch_share(step, n, seed, Share(group=same_label))

    def batch_share(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        return read_ahead(self._read, step, n, seed, share)

    def _read(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        rows = self._places(step, n, seed, share.group)
        mirrored = flipped(self.size, step, n, seed) if self.flip else torch.zeros(n).bool()
        mean, logvar = self._posterior(*share.rows(rows, mirrored))
        if self.sample and logvar is not None:
            noise = torch.empty_like(mean)
            (drawn,) = share.rows(torch.arange(step * n, (step + 1) * n))
            for i, place in enumerate(drawn.tolist()):
                noise[i].normal_(generator=seeded("posterior", seed, place))
            mean.addcmul_(logvar.clamp_(*LOGVAR_RANGE).mul_(0.5).exp_(), noise)
        return mean.sub_(self._shift).mul_(self._scale), self._cond(rows)

    def _places(self, step: int, n: int, seed: int, group: int) -> Tensor:
        if group == 1 or self._labels is None:
            return places(self.size, step, n, seed)
        return self._label_groups.places(step, n, seed, group)

    @cached_property
    def _label_groups(self) -> LabelGroups:
        assert self._labels is not None
        return LabelGroups(self._labels)

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        """The posteriors' means for a random subset of n different pictures, none mirrored."""
        rows = subset(self.size, n, seed)
        mean, _ = self._posterior(rows, torch.zeros(len(rows)).bool())
        return (mean - self._shift) * self._scale, self._cond(rows)

    def sample_labels(self, n: int) -> Cond | None:
        """n labels, each as often as in the data and evenly mixed; None without labels."""
        if self._labels is None:
            return None
        counts = torch.bincount(self._labels, minlength=self.num_classes)
        return {"label": interleave(apportion(n, counts))}

    def decode(self, codes: Tensor) -> Tensor:
        return self.codes.decode(codes)

    def _posterior(self, rows: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor | None]:
        first = self._rows["posterior"][0]
        found = np.empty((len(rows), *first.shape[1:]), first.dtype)
        length = self.manifest.shards[0].rows
        for i, (row, flip) in enumerate(zip(rows.tolist(), mirrored.tolist(), strict=True)):
            shards = self._rows["posterior_flipped" if flip else "posterior"]
            found[i] = shards[row // length][row % length]
        values = torch.from_numpy(found).float()
        if not self.manifest.plan["logvar"]:
            return values, None
        mean, logvar = values.chunk(2, 1)
        return mean.contiguous(), logvar.contiguous()

    def _cond(self, rows: Tensor) -> Cond | None:
        return None if self._labels is None else {"label": self._labels[rows]}

    @cached_property
    def _scale(self) -> Tensor:
        return torch.tensor(self.manifest.scale)[:, None, None]

    @cached_property
    def _shift(self) -> Tensor:
        return torch.tensor(self.manifest.shift)[:, None, None]
