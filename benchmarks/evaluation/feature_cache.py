"""Images in blocks of 256, and what is kept of them: features on disk, PNGs if wanted.

    CACHE/<key>/about.json                 all that the features depend on
                block_000000.safetensors   float32 [256 d], and their SHA-256

The key is the hash of `about`, so features are found again by content: a killed run continues with
the blocks that are missing, and another run of the same network and samples computes nothing.
Blocks are shared out over processes, which only need to see the same folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from backbones.pretrained.tensors import save_tensors
from benchmarks.metrics.evaluate import BLOCK
from registry import progress
from registry.protocols import Extractor
from trainers import ranks
from trainers.checkpoints.whole_files import whole_file, write_text

log = logging.getLogger(__name__)


class Sink(Protocol):
    """A place that keeps something of every block of images."""

    def has(self, block: int) -> bool: ...
    def take(self, block: int, images: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FeatureSink:
    """The features of `num` images, which `about` determines."""

    cache: Path
    about: Mapping[str, str]
    num: int
    extractor: Extractor

    @property
    def folder(self) -> Path:
        return self.cache / hashlib.sha256(_text(self.about).encode()).hexdigest()[:16]

    def has(self, block: int) -> bool:
        path = self._path(block)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                rows, noted = file.get_slice("features").get_shape()[0], file.metadata() or {}
                if rows != _size(block, self.num):
                    return False  # the last block of another number of samples has other draws
                if noted.get("sha256") not in (None, _digest(file.get_tensor("features"))):
                    raise SafetensorError("its content has changed")
        except SafetensorError as error:
            log.warning("%s is damaged and computed again: %s", path, error)
            return False
        return True

    def take(self, block: int, images: Tensor) -> None:
        path = self._path(block)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = path.with_name("about.json")
        if not about.exists():
            write_text(about, _text(self.about))
        features = self.extractor(images).contiguous()
        with whole_file(path, durable=False) as partial:  # its SHA-256 is checked before it is used
            save_tensors(partial, {"features": features}, {"sha256": _digest(features)})

    def load(self) -> Tensor:
        """All features [num d] in order."""
        return torch.cat(
            [load_file(self._path(block))["features"] for block in range(num_blocks(self.num))]
        )

    def _path(self, block: int) -> Path:
        return self.folder / f"block_{block:06d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class PngSink:
    """Every image as a PNG named by its row; FOLDER.json beside them says what they depend on."""

    folder: Path
    about: Mapping[str, str]
    num: int

    def claim(self) -> None:
        """ValueError if the folder has other images, which would be taken for these."""
        beside = self.folder.with_suffix(".json")
        if beside.exists() and beside.read_bytes() == _text(self.about).encode():
            return
        if self.folder.exists():
            raise ValueError(
                f"{self.folder} has the images of another evaluation; choose another folder for "
                "--save-images, or remove that one"
            )
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_text(beside, _text(self.about))

    def has(self, block: int) -> bool:
        return all(self._path(row).exists() for row in _rows(block, self.num))

    def take(self, block: int, images: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for row, image in zip(_rows(block, self.num), images.cpu(), strict=True):
            pixels = image.permute(1, 2, 0).numpy()
            path = self._path(row)
            picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            with whole_file(path, durable=False) as partial:  # a wait for each of 50,000 is minutes
                picture.save(partial, format="PNG")

    def _path(self, row: int) -> Path:
        return self.folder / f"{row:06d}.png"


def fill(
    sinks: Sequence[Sink],
    num: int,
    images: Callable[[int, int], Tensor],
    label: str,
) -> None:
    """Fill the sinks with the blocks that they lack, made by `images(first, count)`.

    Each process makes its share of them, and all return together.
    """
    mine = range(ranks.number(), num_blocks(num), ranks.count())
    lacking = {block: [s for s in sinks if not s.has(block)] for block in mine}
    done = sum(_size(block, num) for block, wanting in lacking.items() if not wanting)
    total = sum(_size(block, num) for block in mine)
    worth = ranks.leads() and total != done
    with progress.bar(None, label, worth=worth, total=total, initial=done, unit="img") as bar:
        for block, wanting in lacking.items():
            if not wanting:
                continue
            made = images(block * BLOCK, _size(block, num))
            for sink in wanting:
                sink.take(block, made)
            bar.update(len(made))
    ranks.gathered(None)  # waits for the other processes


def num_blocks(num: int) -> int:
    return -(-num // BLOCK)


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.numpy().tobytes()).hexdigest()


def _size(block: int, num: int) -> int:
    return min(BLOCK, num - block * BLOCK)


def _rows(block: int, num: int) -> range:
    return range(block * BLOCK, block * BLOCK + _size(block, num))


def _text(about: Mapping[str, str]) -> str:
    return json.dumps(dict(about), indent=2, sort_keys=True) + "\n"
