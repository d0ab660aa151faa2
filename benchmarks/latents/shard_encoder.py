"""One shard: the pictures of some files to posteriors of a VAE, written as one file of latents.

Pixels are read by benchmarks/data/image_pixels.py and enter the VAE as x / 127.5 - 1, in [-1, 1].
The posteriors of the mirrored pictures are stored too, if wanted: the latents of a mirrored picture
are not the mirrored latents of the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.image_pixels import SQUARES, read_picture
from benchmarks.data.picture_faults import fault_of
from benchmarks.latents.autoencoders import DiffusersVae
from benchmarks.latents.process_pool import Tell
from benchmarks.latents.shards import DTYPES, Moments, Shard, write_shard

PREPROCESSING = (
    f"upright by EXIF, on white where transparent, {SQUARES}, Pillow's "
    "antialiased bicubic filter, uint8, x / 127.5 - 1"
)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How pictures become latents."""

    vae: DiffusersVae
    resolution: int = 256  # of the pictures, in pixels
    flips: bool = True  # store the mirrored pictures too
    dtype: str = "float16"  # of the stored latents
    batch_size: int = 16  # pictures that go through the VAE at a time

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.resolution < 1 or self.batch_size < 1:
            raise ValueError(
                f"--resolution {self.resolution} and --batch-size {self.batch_size} must be at "
                "least 1"
            )


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard that is to be made."""

    folder: Path  # where its file goes
    number: int
    files: tuple[Path, ...]  # the pictures
    labels: tuple[int, ...]  # one for each picture, or none
    encoder: Encoder

    def sizes(self) -> str:
        """The SHA-256 of the sizes of its pictures' files.

        It differs after a picture was repaired, and costs no reading.
        """
        listing = " ".join(str(path.stat().st_size) for path in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()


class Unreadable(ValueError):
    """Some pictures of a shard cannot be read; each argument is a line about one of them."""


def encode_shard(task: ShardTask, device: str, threads: int, tell: Tell) -> Shard:
    """Make one shard, and tell how many pictures are done; Unreadable if some cannot be read."""
    encoder, source, broken = task.encoder, hashlib.sha256(), list[str]()
    rows: dict[str, list[Tensor]] = {"posterior": []}
    if encoder.flips:
        rows["posterior_flipped"] = []
    moments = Moments()
    for pictures in _read_ahead(task, threads):
        broken += [picture for picture in pictures if isinstance(picture, str)]
        if broken:
            tell(len(pictures))
            continue
        for _, digest in pictures:
            source.update(digest)
        pixels = torch.stack([pixels for pixels, _ in pictures]).to(device).float() / 127.5 - 1
        for name, kept in rows.items():
            mean, logvar = encoder.vae.encode(pixels.flip(-1) if "flipped" in name else pixels)
            moments.add(mean, logvar)
            kept.append(_stored(mean, logvar, encoder.dtype))
        tell(len(pictures))
    if broken:
        raise Unreadable(*broken)
    tensors = {name: torch.cat(kept) for name, kept in rows.items()}
    if task.labels:
        tensors["label"] = torch.tensor(task.labels)
    return write_shard(task.folder, task.number, tensors, source.hexdigest(), moments, task.sizes())


def _stored(mean: Tensor, logvar: Tensor | None, dtype: str) -> Tensor:
    posterior = mean if logvar is None else torch.cat([mean, logvar], 1)
    kept = posterior.to(DTYPES[dtype]).cpu().contiguous()
    if not bool(kept.isfinite().all()):
        raise ValueError(
            f"latents up to {float(posterior.abs().max()):.3g} do not fit into {dtype}, or the VAE "
            "gives values that are not finite; encode with --dtype float32"
        )
    return kept


def _read_ahead(task: ShardTask, threads: int) -> Iterator[list[Any]]:
    """The shard's pictures in batches; the next batch is read while one is encoded."""
    files, size = task.files, task.encoder.batch_size
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    read = partial(_read, resolution=task.encoder.resolution)
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(read, path) for path in batches[0]]
        for following in [*batches[1:], ()]:
            upcoming = [pool.submit(read, path) for path in following]
            yield [future.result() for future in pending]
            pending = upcoming


def _read(path: Path, resolution: int) -> tuple[Tensor, bytes] | str:
    """The pixels and the hash of a file, or a text that says what is wrong with it."""
    try:
        content = path.read_bytes()
        pixels = read_picture(BytesIO(content), resolution, 3)
    except Exception as error:  # decoders raise any kind; all are reported
        return f"{path} ({fault_of(error, path)})"
    return pixels, hashlib.sha256(content).digest()
