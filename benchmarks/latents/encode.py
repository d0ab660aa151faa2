"""`objective-zoo encode`: a folder of pictures to the latents of a VAE on disk, once.

For each picture the mean and the log-variance of its posterior are stored, not one sample. Networks
train on (latent - shift) scale. With `normalise = "constants"` these two are the constants of the
VAE's config; with `normalise = "channel"` they are the mean and the inverse standard deviation of
each channel over these latents, as LightningDiT has them with VA-VAE (arXiv 2501.01423).

The work is cut into shards. One worker encodes a shard, writes it whole and notes its hash. A
command that runs again makes only the shards that are missing or damaged. So a killed command, a
full disk or a damaged file costs no more than the shards that it touched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.image_files import FoundPictures, find_pictures
from benchmarks.data.image_pixels import check_pictures
from benchmarks.data.picture_faults import refuse_unreadable
from benchmarks.latents.autoencoders import DiffusersVae
from benchmarks.latents.process_pool import outcomes
from benchmarks.latents.shard_encoder import (
    PREPROCESSING,
    Encoder,
    ShardTask,
    Unreadable,
    encode_shard,
)
from benchmarks.latents.shards import PLAN, Manifest, Shard, channel_statistics, finished_shards
from registry import progress
from trainers.checkpoints.locks import alone
from trainers.checkpoints.whole_files import PARTIAL, write_json
from trainers.devices import device_of

LOCK = ".lock"

log = logging.getLogger(__name__)


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
    splits_are_classes: bool = False,
) -> Manifest:
    """Encode the pictures under `data` into the folder `out`.

    A folder that was begun with the same settings is continued: only shards that are missing or
    damaged are made.
    """
    if normalise not in ("constants", "channel") or shard_rows < 1 or workers < 1:
        raise ValueError(
            f"--normalise {normalise!r} must be 'constants' or 'channel'; --shard-rows "
            f"{shard_rows} and --workers {workers} must be at least 1"
        )
    if normalise == "constants" and not encoder.vae.has_constants:
        raise ValueError(
            f"{encoder.vae.path} holds no constants for scale and shift; give --normalise channel"
        )
    data, out = data.expanduser(), out.expanduser()
    if out.resolve().is_relative_to(data.resolve()):
        raise ValueError(f"--out {out} is among the pictures of --data {data}; choose another one")
    found = find_pictures(
        data,
        labelled=labelled,
        splits_are_classes=splits_are_classes,
        unlabelled="ignore the sub-folders by --no-labels",
        consent="give --splits-are-classes",
    )
    check_pictures(found.files, encoder.resolution)
    plan, chosen = _plan(data, found, encoder, shard_rows), _devices(device)
    with alone(out / LOCK, "an encoding"):
        return _encode(plan, found, out, encoder, normalise, shard_rows, workers, chosen)


def _encode(
    plan: Mapping[str, Any],
    found: FoundPictures,
    out: Path,
    encoder: Encoder,
    normalise: str,
    shard_rows: int,
    workers: int,
    devices: Sequence[str],
) -> Manifest:
    """Make the shards that are missing or damaged, while this process holds the folder's lock."""
    _keep_plan(plan, out)
    for leftover in out.glob(PARTIAL):  # of a command that was killed while it wrote
        leftover.unlink()
    tasks = [
        ShardTask(
            folder=out,
            number=number,
            files=found.files[start : start + shard_rows],
            labels=found.labels[start : start + shard_rows],
            encoder=encoder,
        )
        for number, start in enumerate(range(0, len(found.files), shard_rows))
    ]
    if workers > len(tasks):
        log.warning(
            "%d pictures in shards of %d leave %d of %d workers without work; give a smaller "
            "--shard-rows",
            *(len(found.files), shard_rows, workers - len(tasks), workers),
        )
    shards, problems = finished_shards(out, [task.sizes() for task in tasks])
    for problem in problems:
        log.warning("%s: encoded again", problem)
    missing = [task for task in tasks if task.number not in shards]
    done = sum(shard.rows for shard in shards.values())
    with progress.bar(None, "encoding", total=len(found.files), initial=done, unit="img") as bar:
        shards |= _run(missing, min(workers, len(missing)), devices, bar)
    manifest = _manifest(plan, [shards[task.number] for task in tasks], encoder, normalise)
    manifest.save(out)
    return manifest


def _plan(data: Path, found: FoundPictures, encoder: Encoder, shard_rows: int) -> dict[str, Any]:
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
    """A posterior [1 c h w] of a picture of this size.

    ValueError if the VAE does not decode it to a picture of the same size.
    """
    pixels = torch.zeros(1, 3, size, size)
    try:
        mean, logvar = vae.encode(pixels)
        back = vae.decode(mean)
    except RuntimeError as error:
        raise ValueError(f"--resolution {size} does not fit the VAE: {error}") from error
    if back.shape != pixels.shape:
        raise ValueError(
            f"--resolution {size} does not fit the VAE: pictures of {size} pixels come back with "
            f"{back.shape[-1]}. Choose a multiple of the factor by which the VAE divides the sides"
        )
    return mean, logvar


def _keep_plan(plan: Mapping[str, Any], out: Path) -> None:
    """Write the plan into the folder; ValueError if the folder has another plan or other files."""
    path = out / PLAN
    if not path.is_file():
        if set(out.iterdir()) - {out / LOCK, *out.glob(f".{PLAN}{PARTIAL}")}:
            raise ValueError(f"{out} is not empty and holds no latents; choose another --out")
        write_json(path, plan)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        before["source"]["folder"] = plan["source"]["folder"]  # the pictures may have moved
        before["vae"]["path"] = plan["vae"]["path"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"{path} is damaged, so that nobody knows how the shards beside it were made. Remove "
            f"the folder {out}, or choose another --out"
        ) from None
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
        raise ValueError(
            f"channel {std.index(min(std))} of the latents is constant, so it has no inverse "
            "standard deviation; give --normalise constants if the VAE has constants"
        )
    about = {"normalise": normalise, "channel_mean": mean, "channel_std": std}
    return Manifest(
        plan={**plan, **about}, shards=tuple(shards), scale=tuple(scale), shift=tuple(shift)
    )


def _run(
    tasks: Sequence[ShardTask], workers: int, devices: Sequence[str], bar: Any
) -> dict[int, Shard]:
    """The shards of all tasks by number.

    ValueError names the pictures that cannot be read, after all other shards are made.
    """
    shards: dict[int, Shard] = {}
    broken: list[str] = []
    for task, outcome in outcomes(encode_shard, tasks, workers, devices, bar.update):
        try:
            shards[task.number] = outcome()
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
