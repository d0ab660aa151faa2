"""The samples that a run keeps, so that a report can show them without network and data.

    samples.safetensors                nfe1, nfe2, ...: the samples at the end, float32
    samples/step_00000400.safetensors  the first of the same samples at an evaluation
    real.safetensors                   real data to compare with; for pictures label [k],
                                       nearest_nfe1 [k c h w], distance_nfe1 [k],
                                       as_sharp_nfe1 [j], ... and real_distance [m],
                                       for points real [n 2]

Pictures are uint8 in the last two. Noise and labels are the same at every step and NFE, and in
every run of a seed. The nearest training picture is the one at the smallest Euclidean distance over
pixels in [-1, 1], among the first 20,000 that the run was trained on; `real_distance` is that
distance between training pictures themselves. A blurred picture lies near many others, so
`as_sharp_nfe1` is that distance of training pictures which are blurred until they are as sharp as
the samples at 1 NFE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.pretrained.tensors import save_tensors
from benchmarks.data.pictures import is_picture, is_points, to_uint8
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.sampled_steps import check_steps
from benchmarks.metrics import evaluate
from benchmarks.metrics.sharpness import as_sharp_as
from benchmarks.runs.result import REAL, SAMPLES
from registry.protocols import Coded, Cond, Dataset, Sampler, to_device
from trainers import ranks
from trainers.devices import check_rows

NUM_SAMPLES = 64  # kept per NFE at the end, of data that are not points
NUM_KEPT = 16  # of them at each evaluation, and with their nearest pictures
NUM_POINTS = 500
MAX_SEARCHED = 20_000
_CHUNK = 500
_BLURRED = 64  # training pictures that are blurred to the sharpness of the samples


def draw_samples(
    experiment: Experiment,
    net: Callable[..., Any],
    nfe: tuple[int, ...],
    num: int,
    seed: int,
    labels: int | Sequence[int] | None = None,
) -> dict[int, Tensor]:
    """`num` samples at each NFE from the same noise and labels.

    `labels` is the class of all, or one for each; None stands for the frequencies of the data.
    """
    check_rows("num", num, experiment.dataset.shape)
    x1 = evaluate.noise(experiment.dataset.shape, num, seed).to(experiment.device)
    cond = to_device(_chosen(experiment.dataset, num, labels), experiment.device)
    return {
        n: evaluate.decoded(experiment.dataset, evaluate.draw(net, sampler, x1, cond, seed)).cpu()
        for n, sampler in samplers_at(experiment, nfe).items()
    }


def samplers_at(experiment: Experiment, nfe: Sequence[int]) -> dict[int, Sampler]:
    """The run's sampler at each NFE; ValueError for one that takes steps which are never trained.

    It is raised for an NFE that the sampler cannot have, too. The NFEs that a finished run has
    recorded are taken as they are: opening it has warned of them.
    """
    recorded = experiment.nfe if experiment.as_recorded else ()
    if new := [n for n in nfe if n not in recorded]:
        check_steps(experiment, new)
    return evaluate.samplers_for(experiment.sampler, nfe)


def _chosen(dataset: Dataset, num: int, labels: int | Sequence[int] | None) -> Cond | None:
    if labels is None:
        return dataset.sample_labels(num)
    if not dataset.num_classes:
        raise ValueError(f"labels = {labels!r}: {dataset.name} has no classes; leave labels out")
    chosen = np.asarray(labels)
    fit = chosen.dtype.kind in "iu" and chosen.shape in ((), (num,))
    if not fit or not ((chosen >= 0) & (chosen < dataset.num_classes)).all():
        raise ValueError(
            f"labels = {labels!r} must be a class, or {num} of them, from 0 to "
            f"{dataset.num_classes - 1}"
        )
    return {"label": torch.from_numpy(np.full(num, chosen, dtype=np.int64))}


def final_samples(experiment: Experiment, net: Callable[..., Any]) -> dict[int, Tensor]:
    """The samples that a run shows: by NFE, from the noise and labels of its seed."""
    return draw_samples(experiment, net, experiment.nfe, _num(experiment), experiment.seed)


def keep_samples(experiment: Experiment, net: Callable[..., Any], folder: Path, step: int) -> None:
    """Save the first of the run's samples, drawn at this step."""
    samples = _first(final_samples(experiment, net))
    if ranks.leads():
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / f"step_{step:08d}.safetensors", samples)


def keep_all(
    experiment: Experiment, samples: Mapping[int, Tensor], images_seen: int, folder: Path
) -> None:
    """Save the run's samples, and the real data that a report shows beside them."""
    save_tensors(folder / SAMPLES, {f"nfe{n}": x for n, x in samples.items()})
    dataset, real = experiment.dataset, {}
    if is_points(dataset.shape):
        points = dataset.reference(_num(experiment), experiment.seed)[0][:NUM_POINTS]
        real["real"] = evaluate.decoded(dataset, points)
    elif is_picture(dataset.shape) and dataset.size and not isinstance(dataset, Coded):
        num = min(dataset.size, images_seen, MAX_SEARCHED)
        real = _nearest_pictures(dataset, samples, num, experiment.seed)
        if labels := dataset.sample_labels(_num(experiment)):
            real |= {name: value[:NUM_KEPT] for name, value in labels.items()}
    if real:
        save_tensors(folder / REAL, real)


def _num(experiment: Experiment) -> int:
    wanted = experiment.num_samples
    return wanted if is_points(experiment.dataset.shape) else min(NUM_SAMPLES, wanted)


def _first(samples: Mapping[int, Tensor]) -> dict[str, Tensor]:
    shape = tuple(next(iter(samples.values())).shape[1:])
    count = NUM_POINTS if is_points(shape) else NUM_KEPT
    rows = {f"nfe{n}": x[:count].contiguous() for n, x in samples.items()}
    return {name: to_uint8(x) for name, x in rows.items()} if is_picture(shape) else rows


def _nearest_pictures(
    dataset: Dataset, samples: Mapping[int, Tensor], num: int, seed: int
) -> dict[str, Tensor]:
    """The nearest training pictures of the first samples, and of some training pictures."""
    shown = {n: x[:NUM_KEPT] for n, x in samples.items()}
    itself = evaluate.decoded(dataset, dataset.batch(0, min(num, _CHUNK), seed)[0])
    found, distance = _nearest(torch.cat(list(shown.values())), dataset, num, seed)
    counts = [len(x) for x in shown.values()]
    kept: dict[str, Tensor] = {}
    for n, pictures, far in zip(shown, found.split(counts), distance.split(counts), strict=True):
        kept |= {f"nearest_nfe{n}": to_uint8(pictures), f"distance_nfe{n}": far}
    if num > 1:
        own = range(len(itself))
        kept["real_distance"] = _nearest(itself, dataset, num, seed, leave_out=own)[1]
        some = itself[:_BLURRED]
        for n, x in shown.items():
            as_sharp = as_sharp_as(some, x)
            _, far = _nearest(as_sharp, dataset, num, seed, leave_out=range(len(some)))
            kept[f"as_sharp_nfe{n}"] = far
    return kept


def _nearest(
    queries: Tensor, dataset: Dataset, num: int, seed: int, leave_out: range = range(0)
) -> tuple[Tensor, Tensor]:
    """The nearest of the first `num` training pictures, and how far; query i skips leave_out[i]."""
    best = torch.full((len(queries),), torch.inf)
    found = queries.clone()
    for start in range(0, num, _CHUNK):
        rows = dataset.batch(start // _CHUNK, _CHUNK, seed)[0][: num - start]
        rows = evaluate.decoded(dataset, rows)
        distance = torch.cdist(
            queries.flatten(1), rows.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        for i, own in enumerate(leave_out):
            if start <= own < start + len(rows):
                distance[i, own - start] = torch.inf
        value, place = distance.min(1)
        nearer = value < best
        best = torch.where(nearer, value, best)
        found[nearer] = rows[place[nearer]]
    return found, best
