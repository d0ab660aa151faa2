"""Latents on disk: shards in safetensors files, which are read through the page cache.

    plan.json                what is encoded and how; a folder is only continued with the same plan
    shard_00000.safetensors  posterior [n 2k h w], the mean and then the log-variance, or [n k h w]
                             if the encoder is deterministic; posterior_flipped, the same for the
                             mirrored pictures; label, int64 [n]
    shard_00000.json         rows, size and SHA-256 of the shard, hashes of its pictures, sums over
                             its channels
    manifest.json            the plan, all shards and the normalisation; written last, when all
                             shards are there

One row is read by one access. Files of safetensors can be mapped and checked without any library;
docs/decisions/005-latent-shards.md compares them with other formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from backbones.pretrained.tensors import save_tensors
from trainers.checkpoints.whole_files import file_sha256, whole_file, write_json

PLAN, MANIFEST = "plan.json", "manifest.json"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
LOGVAR_RANGE = (-30.0, 20.0)  # the autoencoders clamp log-variances to it
SHOWN = 5  # damaged shards in an error


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What is known about one file of latents; it is written beside that file."""

    file: str
    rows: int
    bytes: int
    sha256: str
    source_sha256: str  # of the hashes of its pictures' files
    count: int  # the number of values in each channel
    sums: list[float]  # of sampled latents, in each channel
    squares: list[float]  # of the squares of sampled latents, in each channel
    sizes_sha256: str = ""  # of the sizes of its pictures' files; older folders do not have it

    def save(self, folder: Path) -> None:
        write_json((folder / self.file).with_suffix(".json"), asdict(self))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of latents holds."""

    plan: Mapping[str, Any]
    shards: tuple[Shard, ...]
    scale: tuple[float, ...]  # for each channel: a network trains on (latent - shift) scale
    shift: tuple[float, ...]

    @property
    def num(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.plan["latent_shape"])

    def identity(self) -> str:
        facts = [self.scale, self.shift, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        source = "\n".join(shard.source_sha256 for shard in self.shards)
        content = {
            **self.plan,
            "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
            "scale": self.scale,
            "shift": self.shift,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_json(folder / MANIFEST, content)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a folder; ValueError if it holds no latents, or not all of them yet."""
        if not (folder / MANIFEST).is_file():
            begun = (folder / PLAN).is_file()
            raise ValueError(
                f"{folder} holds no finished latents (no {MANIFEST}). "
                + ("Run the encode command again: it goes on where it stopped" if begun else _HOW)
            )
        try:
            found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return cls(
                shards=tuple(Shard(**shard) for shard in found.pop("shards")),
                scale=tuple(found.pop("scale")),
                shift=tuple(found.pop("shift")),
                plan=found,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(
                f"{folder / MANIFEST} is damaged: it is no manifest of latents. Run the encode "
                "command again: it keeps the whole shards and writes the manifest anew"
            ) from None


_HOW = "Make them by: objective-zoo encode --data FOLDER --vae NAME --out DIR"


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    tensors: Mapping[str, Tensor],
    source: str,
    moments: Moments,
    sizes: str = "",
) -> Shard:
    """Write one shard, and beside it what is known about it.

    `source` and `sizes` are the hashes of the contents and of the sizes of its pictures' files.
    """
    path = folder / shard_name(number)
    with whole_file(path) as partial:
        save_tensors(partial, tensors)
    shard = Shard(
        file=path.name,
        rows=len(tensors["posterior"]),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        source_sha256=source,
        count=moments.count,
        sums=moments.sums.tolist(),
        squares=moments.squares.tolist(),
        sizes_sha256=sizes,
    )
    shard.save(folder)
    return shard


class Moments:
    """Sums over each channel of latents, as samples of the posteriors have them in expectation."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, mean: Tensor, logvar: Tensor | None) -> None:
        """Add posteriors with this mean and log-variance [n k h w]."""
        values = mean.double().cpu()
        spread = 0.0 if logvar is None else logvar.clamp(*LOGVAR_RANGE).double().exp().cpu()
        self.count += values.numel() // values.shape[1]
        self.sums = self.sums + values.sum((0, 2, 3))
        self.squares = self.squares + (values.square() + spread).sum((0, 2, 3))


def channel_statistics(shards: Sequence[Shard]) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of each channel over all shards."""
    count = sum(shard.count for shard in shards)
    mean = torch.tensor([shard.sums for shard in shards], dtype=torch.float64).sum(0) / count
    square = torch.tensor([shard.squares for shard in shards], dtype=torch.float64).sum(0) / count
    return mean.tolist(), (square - mean.square()).sqrt().tolist()


def finished_shards(folder: Path, sizes: Sequence[str]) -> tuple[dict[int, Shard], list[str]]:
    """The whole shards by number, and a line about each shard that is damaged or outdated.

    Every file is read and hashed. `sizes` has, for each shard, the hash of the sizes that its
    pictures' files have now.
    """
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(_finished, folder), range(len(sizes)), sizes))
    whole = {n: shard for n, shard in enumerate(found) if isinstance(shard, Shard)}
    return whole, [problem for problem in found if isinstance(problem, str)]


def _finished(folder: Path, number: int, sizes: str) -> Shard | str | None:
    path = folder / shard_name(number)
    about = path.with_suffix(".json")
    if not about.is_file():
        return f"{path} has lost its {about.name}" if path.is_file() else None
    try:
        shard = Shard(**json.loads(about.read_text()))
    except (ValueError, TypeError):
        return f"{about} cannot be read"
    if shard.file != path.name:
        return f"{about} is of another shard, {shard.file}"
    if shard.sizes_sha256 not in ("", sizes):
        return f"pictures of {path} have changed"
    return damage(folder, shard, content=True) or shard


def damage(folder: Path, shard: Shard, *, content: bool) -> str:
    """What is wrong with a shard, or '' if nothing is.

    Its size is compared, and with `content` its SHA-256 too.
    """
    path = folder / shard.file
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != shard.bytes:
        return f"{path} has {size} bytes instead of {shard.bytes}"
    if content and file_sha256(path) != shard.sha256:
        return f"{path} was changed after it was written (SHA-256 differs)"
    return ""


def open_shards(folder: Path, manifest: Manifest, *, content: bool) -> list[dict[str, Tensor]]:
    """The tensors of all shards, mapped into memory; ValueError names the damaged shards."""
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(lambda s: damage(folder, s, content=content), manifest.shards))
    opened = []
    for i, shard in enumerate(manifest.shards):
        if problems[i]:
            continue
        try:
            with safe_open(folder / shard.file, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            if _misfit(shapes, shard.rows, manifest):
                problems[i] = f"{folder / shard.file} holds {shapes}"
            opened.append(load_file(folder / shard.file))
        except SafetensorError:
            problems[i] = f"{folder / shard.file} is no whole file of safetensors"
        else:
            problems[i] = problems[i] or _odd_values(folder / shard.file, opened[-1], manifest)
    if broken := [problem for problem in problems if problem]:
        more = f"\nand {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ValueError(
            "\n".join(broken[:SHOWN])
            + more
            + "\nRun the encode command again: it makes only these shards anew"
        )
    return opened


def _odd_values(path: Path, tensors: Mapping[str, Tensor], manifest: Manifest) -> str:
    """What is wrong with the types and labels of a shard, or '' if nothing is."""
    dtype = DTYPES[manifest.plan["dtype"]]
    wanted = {name: torch.int64 if name == "label" else dtype for name in tensors}
    if other := [f"{n} as {t.dtype}" for n, t in tensors.items() if t.dtype != wanted[n]]:
        return f"{path} holds {', '.join(other)}; the manifest says {dtype}, and labels are int64"
    labels, num_classes = tensors.get("label"), len(manifest.plan["classes"])
    if labels is not None and not bool(((labels >= 0) & (labels < num_classes)).all()):
        return f"{path} has labels outside of 0 to {num_classes - 1}, the classes of the manifest"
    return ""


def _misfit(shapes: Mapping[str, list[int]], rows: int, manifest: Manifest) -> bool:
    wanted = ["posterior"] + ["posterior_flipped"] * manifest.plan["flips"]
    channels = manifest.shape[0] * (2 if manifest.plan["logvar"] else 1)
    sizes = {name: [rows, channels, *manifest.shape[1:]] for name in wanted}
    return shapes != (sizes | {"label": [rows]} if manifest.plan["classes"] else sizes)
