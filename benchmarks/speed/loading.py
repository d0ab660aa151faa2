"""How fast the processes of a run read their batches, beside a plain copy of the same bytes.

    python -P -m benchmarks.loading FOLDER --ranks 8 --batch 1024

FOLDER holds latents or pictures. Without it, latents of noise are made, each as large as those of
Stable Diffusion's VAE at 256 pixels. Every process reads its share as in training, with the next
batch read ahead, and drops it at once. So the result is the highest rate that a run could use. The
first batch is not counted. Images per second are those of all processes together. Where there are
more processes than cores, the rate per second of CPU time tells more.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.image_folder import ImageFolder
from benchmarks.latents.dataset import Latents
from benchmarks.latents.shards import MANIFEST, Manifest, Moments, write_shard
from registry.protocols import Dataset, Share, read_share

SHAPE = (4, 32, 32)
SHARD_ROWS = 1024
COPIED = 2**28  # bytes that are copied in turn, more than any cache holds


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each process reads; `resolution` is that of pictures."""

    folder: Path
    ranks: int
    batch: int
    steps: int
    resolution: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Images per second of all processes, and per second of CPU time."""

    wall: float
    cpu: float


class NoVae:
    """Stands for the VAE that latents of noise do not have."""

    def provenance(self) -> dict[str, str]:
        return {"kind": "none", "path": "", "subfolder": "", "sha256": "none"}


def write_noise(folder: Path, rows: int) -> None:
    """Latents of noise in the layout of objective-zoo encode, with mirrored copies and labels."""
    shards = []
    for number in range(rows // SHARD_ROWS):
        halves = torch.randn(2, SHARD_ROWS, 2 * SHAPE[0], *SHAPE[1:]).half()
        tensors = {"posterior": halves[0].clone(), "posterior_flipped": halves[1].clone()}
        tensors["label"] = torch.randint(1000, (SHARD_ROWS,))
        moments = Moments()
        moments.add(*halves[0].float().chunk(2, 1))
        shards.append(write_shard(folder, number, tensors, "noise", moments))
    plan = {"latent_shape": SHAPE, "logvar": True, "flips": True, "vae": NoVae().provenance()}
    plan["dtype"] = "float16"
    plan["classes"] = [str(i) for i in range(1000)]
    scale, shift = (0.18215,) * SHAPE[0], (0.0,) * SHAPE[0]
    Manifest(plan=plan, shards=tuple(shards), scale=scale, shift=shift).save(folder)


def open_folder(folder: Path, resolution: int) -> Dataset:
    if not (folder / MANIFEST).is_file():
        return ImageFolder(folder=str(folder), resolution=resolution, in_memory=False, flip=True)
    about = Manifest.load(folder).plan["vae"]
    vae: Any = NoVae() if about == NoVae().provenance() else None
    return Latents(folder=str(folder), vae=vae)


def measure(work: Work) -> tuple[Rates, Rates]:
    """The rates of reading and of plain copying."""
    open_folder(work.folder, work.resolution)  # an error comes once, before any process
    # A spawned process imports from where this one does: no folder `benchmarks` that happens to be
    # in the current directory takes the place of ours.
    context: Any = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(work.ranks), context.Queue()
    processes = [
        context.Process(target=_rank, args=(work, rank, barrier, results))
        for rank in range(work.ranks)
    ]
    for process in processes:
        process.start()
    found = torch.tensor([results.get() for _ in processes])  # [ranks, reading or copying, 2]
    for process in processes:
        process.join()
    images = work.batch * work.steps
    reading, copying = (
        Rates(wall=images / float(seconds[:, 0].max()), cpu=images / float(seconds[:, 1].sum()))
        for seconds in found.unbind(1)
    )
    return reading, copying


def _rank(work: Work, rank: int, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dataset, share = open_folder(work.folder, work.resolution), Share(rank, work.ranks)

    def read(step: int) -> Tensor:
        return read_share(dataset, step, work.batch, 0, share)[0]

    x0 = read(0)
    into = torch.empty_like(x0)
    sources = x0.repeat(max(1, COPIED // x0.nbytes), *[1] * (x0.ndim - 1)).split(len(x0))

    def copy(step: int) -> Tensor:
        return into.copy_(sources[step % len(sources)])

    found = []
    for act in (read, copy):
        barrier.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(1, work.steps + 1):
            act(step)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    results.put(found)
