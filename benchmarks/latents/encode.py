"""objective-zoo encode: a folder of pictures to the latents of a VAE, on disk, once.

The posterior's mean and log-variance are stored, not one sample, and those of the mirrored pictures
beside them, since encoders do not commute with mirroring. Networks train on (latent - shift) scale:
the constants of the VAE's config, or with `normalise = "channel"` the mean and the inverse standard
deviation of each channel over these latents, as LightningDiT does with VA-VAE (arXiv 2501.01423).

The work is cut into shards. Each is encoded by one worker, written whole and hashed; what is there
and whole is not done again, so a killed command, a full disk or a damaged shard costs that shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.image_files import (
    Found,
    check_pictures,
    find_pictures,
    read_picture,
    refuse_unreadable,
)
from benchmarks.latents.autoencoders import DiffusersVae
from benchmarks.latents.shards import (
    DTYPES,
    PLAN,
    Manifest,
    Moments,
    Shard,
    channel_statistics,
    finished_shards,
    write_shard,
)
from benchmarks.latents.workers import Tell, results
from benchmarks.locks import alone
from trainers import progress
from trainers.checkpoints.whole_files import write_json
from trainers.devices import device_of

PREPROCESSING = (
    "upright by EXIF, on white where transparent, largest centred square, Pillow's antialiased "
    "bicubic filter, uint8, x / 127.5 - 1"
)

LOCK = ".lock"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How pictures become latents; `batch_size` pictures go through the VAE at a time."""

    vae: DiffusersVae
    resolution: int = 256
    flips: bool = True
    dtype: str = "float16"
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")
        if self.resolution < 1 or self.batch_size < 1:
            raise ValueError(
                f"--resolution {self.resolution} --batch-size {self.batch_size}: both at least 1"
            )


def encode(
    data: Path,
    out: Path,
    encoder: Encoder,
    *,
    normalise: str = "constants",
    shard_rows: int = 1024,
    workers: int = 1,
    device: str = "auto",
    labelled: bool = True,
) -> Manifest:
    """Encode the pictures under `data` into `out`, or what is missing or damaged there."""
    if normalise not in ("constants", "channel") or shard_rows < 1 or workers < 1:
        raise ValueError(
            f"--normalise {normalise!r} must be 'constants' or 'channel', --shard-rows "
            f"{shard_rows} and --workers {workers} at least 1"
        )
    if normalise == "constants" and not encoder.vae.has_constants:
        raise ValueError(f"{encoder.vae.path} holds no scale and shift: --normalise channel")
    data, out = data.expanduser(), out.expanduser()
    if out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out {out} is among the pictures of --data {data}; choose another one")
    found = find_pictures(
        data, labelled=labelled, unlabelled="ignore the sub-folders by --no-labels"
    )
    check_pictures(found.files, encoder.resolution)
    plan, chosen = _plan(data, found, encoder, shard_rows), _devices(device)
    with alone(out / LOCK, "an encoding"):
        return _encode(plan, found, out, encoder, normalise, shard_rows, workers, chosen)


def _encode(
    plan: Mapping[str, Any],
    found: Found,
    out: Path,
    encoder: Encoder,
    normalise: str,
    shard_rows: int,
    workers: int,
    devices: Sequence[str],
) -> Manifest:
    """What is missing or damaged."""
    _keep(plan, out)
    jobs = [
        _Job(out, number, found.files[start : start + shard_rows],
             found.labels[start : start + shard_rows], encoder)
        for number, start in enumerate(range(0, len(found.files), shard_rows))
    ]  # fmt: skip
    if workers > len(jobs):
        log.warning(
            "%d pictures in shards of %d leave %d of %d workers without work; give a smaller "
            "--shard-rows",
            *(len(found.files), shard_rows, workers - len(jobs), workers),
        )
    shards, problems = finished_shards(out, [job.sizes() for job in jobs])
    for problem in problems:
        log.warning("%s: encoded again", problem)
    missing = [job for job in jobs if job.number not in shards]
    done = sum(shard.rows for shard in shards.values())
    with progress.bar(None, "encoding", total=len(found.files), initial=done, unit="img") as bar:
        shards |= _run(missing, min(workers, len(missing)), devices, bar)
    manifest = _manifest(plan, [shards[job.number] for job in jobs], encoder, normalise)
    manifest.save(out)
    return manifest


def _plan(data: Path, found: Found, encoder: Encoder, shard_rows: int) -> dict[str, Any]:
    listing = hashlib.sha256()
    for i, path in enumerate(found.files):
        label = found.labels[i] if found.labels else ""
        listing.update(os.fsencode(f"{path.relative_to(data)} {label}\n"))
    mean, logvar = _fitting(encoder.vae, encoder.resolution)
    return {
        "format": 1,
        "vae": encoder.vae.provenance(),
        "latent_shape": list(mean.shape[1:]),
        "logvar": logvar is not None,
        "resolution": encoder.resolution,
        "preprocessing": PREPROCESSING,
        "flips": encoder.flips,
        "dtype": encoder.dtype,
        "shard_rows": shard_rows,
        "num": len(found.files),
        "classes": list(found.classes),
        "source": {"folder": str(data.resolve()), "listing_sha256": listing.hexdigest()},
    }


def _fitting(vae: DiffusersVae, size: int) -> tuple[Tensor, Tensor | None]:
    """A posterior at this size; ValueError if the VAE does not give back what it takes."""
    pixels = torch.zeros(1, 3, size, size)
    try:
        mean, logvar = vae.encode(pixels)
        back = vae.decode(mean)
    except RuntimeError as error:
        raise ValueError(f"--resolution {size} does not fit the VAE: {error}") from error
    if back.shape != pixels.shape:
        raise ValueError(
            f"--resolution {size} does not fit the VAE: pictures of {size} pixels come back with "
            f"{back.shape[-1]}. Choose a multiple of what it divides sides by"
        )
    return mean, logvar


def _keep(plan: Mapping[str, Any], out: Path) -> None:
    """Write the plan; ValueError where another one is under way."""
    path = out / PLAN
    if not path.is_file():
        if any(file.name != LOCK for file in out.iterdir()):
            raise ValueError(f"{out} is not empty and holds no latents; choose another --out")
        write_json(path, plan)
        return
    before = json.loads(path.read_text())
    before["source"]["folder"] = plan["source"]["folder"]  # the pictures may have moved
    before["vae"]["path"] = plan["vae"]["path"]
    if differing := sorted(k for k in before | dict(plan) if before.get(k) != plan.get(k)):
        shown = "; ".join(f"{k} was {before.get(k)}, now {plan.get(k)}" for k in differing)
        raise ValueError(f"{out} was begun with other settings: {shown}. Choose another --out")


def _manifest(
    plan: Mapping[str, Any], shards: Sequence[Shard], encoder: Encoder, normalise: str
) -> Manifest:
    mean, std = channel_statistics(shards)
    if normalise == "constants":
        scale, shift = map(list, encoder.vae.constants(len(mean)))
    elif min(std) > 0:
        scale, shift = [1 / s for s in std], mean
    else:
        raise ValueError(f"channel {std.index(min(std))} of the latents is constant")
    about = {"normalise": normalise, "channel_mean": mean, "channel_std": std}
    return Manifest(
        plan={**plan, **about}, shards=tuple(shards), scale=tuple(scale), shift=tuple(shift)
    )


@dataclass(frozen=True)
class _Job:
    """One shard to make."""

    folder: Path
    number: int
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    encoder: Encoder

    def sizes(self) -> str:
        """The SHA-256 of its pictures' sizes, which tells one that was repaired."""
        listing = " ".join(str(path.stat().st_size) for path in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()


class Unreadable(ValueError):
    """Pictures of a shard that cannot be read, one line each as its arguments."""


def _run(jobs: Sequence[_Job], workers: int, devices: Sequence[str], bar: Any) -> dict[int, Shard]:
    """All jobs' shards by number; unreadable pictures are named when the others are done."""
    shards: dict[int, Shard] = {}
    broken: list[str] = []
    for job, result in results(encode_shard, jobs, workers, devices, bar.update):
        try:
            shards[job.number] = result()
        except Unreadable as error:
            broken += error.args
    refuse_unreadable(
        broken,
        bar.total,
        "put others of the same names in their place, and run the command again for their shards",
    )
    return shards


def _devices(name: str) -> list[str]:
    if name != "auto":
        return [str(device_of(name, "--device"))]
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def encode_shard(job: _Job, device: str, threads: int, tell: Tell) -> Shard:
    """Make one shard, and tell of its pictures; Unreadable names those that cannot be read."""
    encoder, source, broken = job.encoder, hashlib.sha256(), list[str]()
    rows: dict[str, list[Tensor]] = {"posterior": []}
    if encoder.flips:
        rows["posterior_flipped"] = []
    moments = Moments()
    for pictures in _read_ahead(job, threads):
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
    if job.labels:
        tensors["label"] = torch.tensor(job.labels)
    return write_shard(job.folder, job.number, tensors, source.hexdigest(), moments, job.sizes())


def _stored(mean: Tensor, logvar: Tensor | None, dtype: str) -> Tensor:
    posterior = mean if logvar is None else torch.cat([mean, logvar], 1)
    kept = posterior.to(DTYPES[dtype]).cpu().contiguous()
    if not bool(kept.isfinite().all()):
        raise ValueError(
            f"latents up to {float(posterior.abs().max()):.3g} do not fit into {dtype}, or the VAE "
            "gives what is not finite; encode with --dtype float32"
        )
    return kept


def _read_ahead(job: _Job, threads: int) -> Iterator[list[Any]]:
    """The shard's pictures in batches, the next one read while one is encoded."""
    files, size = job.files, job.encoder.batch_size
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    read = partial(_read, resolution=job.encoder.resolution)
    with ThreadPoolExecutor(threads) as pool:
        pending = [pool.submit(read, path) for path in batches[0]]
        for following in [*batches[1:], ()]:
            upcoming = [pool.submit(read, path) for path in following]
            yield [future.result() for future in pending]
            pending = upcoming


def _read(path: Path, resolution: int) -> tuple[Tensor, bytes] | str:
    """Pixels and the file's hash, or what is wrong with it."""
    try:
        content = path.read_bytes()
        pixels = read_picture(BytesIO(content), resolution, 3)
    except Exception as error:  # decoders raise anything; all of it is reported
        return f"{path} ({type(error).__name__}: {error})"
    return pixels, hashlib.sha256(content).digest()
