"""The samples of an evaluation: how a run draws them, and the features that are kept of them.

Samples are drawn in blocks of 256, whose noise, labels and draws depend on the seed and the row
alone, so the numbers are those of any batch size and any number of processes. Of each block only
its features are kept (feature_cache.py), and its images as PNGs if they are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data.pictures import is_picture, to_uint8
from benchmarks.evaluation.feature_cache import FeatureSink, PngSink, Sink, fill
from benchmarks.evaluation.request import EvaluationRequest
from benchmarks.metrics import evaluate
from benchmarks.metrics.features import Extractor
from benchmarks.runs.finished import open_run, training_data
from benchmarks.runs.result import finished_run
from benchmarks.runs.samples import samplers_at
from registry import gin_setup
from registry.protocols import Cond, Dataset, Network, Sampler
from trainers.checkpoints.whole_files import remembered_sha256


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """The samples of one run at each NFE, `shape` being that of one of them, decoded.

    `weights` is the hash of the weight file, and `operative` that of the gin text which says of
    which network these are the weights.
    """

    request: EvaluationRequest
    dataset: Dataset
    real: Callable[[], Dataset]  # with rows, which are needed where there is no other reference
    device: torch.device
    net: Network
    samplers: Mapping[int, Sampler]  # by NFE
    shape: tuple[int, ...]
    weights: str
    operative: str
    cache: Path

    def draw(self, extractors: Sequence[Extractor]) -> None:
        """Draw the samples whose features, or wanted images, are not on disk already."""
        sinks = {nfe: self._sinks(nfe, extractors) for nfe in self.samplers}
        for nfe, sampler in self.samplers.items():
            fill(sinks[nfe], self.request.num, self._images(sampler), f"NFE {nfe}")

    def features(self, nfe: int, extractor: Extractor) -> Tensor:
        """The features [num d] of the samples that were drawn at this NFE."""
        return self._sink(nfe, extractor).load()

    @property
    def label_rule(self) -> str:
        """Which labels the samples have, in words."""
        if not self.dataset.num_classes:
            return "none"
        if self.request.labels == "balanced":
            return f"row i has class i mod {self.dataset.num_classes}"
        return f"with the frequencies of the data, for {self.request.num}"

    def _sinks(self, nfe: int, extractors: Sequence[Extractor]) -> list[Sink]:
        sinks: list[Sink] = [self._sink(nfe, extractor) for extractor in extractors]
        if self.request.save_images:
            pictures = PngSink(
                folder=self.request.save_images / f"nfe{nfe}",
                about={"samples": str(self.request.num), **self._made_by(nfe)},
                num=self.request.num,
            )
            pictures.claim()
            sinks.append(pictures)
        return sinks

    def _sink(self, nfe: int, extractor: Extractor) -> FeatureSink:
        return FeatureSink(
            cache=self.cache,
            # An extractor names its weights "weights" too, so the network's get another name.
            about={**self._made_by(nfe), **extractor.provenance(), "network": self.weights},
            num=self.request.num,
            extractor=extractor,
        )

    def _made_by(self, nfe: int) -> dict[str, str]:
        return {
            "weights": self.weights,
            "operative": self.operative,
            "sampler": repr(self.samplers[nfe]),
            "seed": str(self.request.seed),
            "labels": self.label_rule,
            "data": self.dataset.identity(),
            **rounding(self.shape),
        }

    def _images(self, sampler: Sampler) -> Callable[[int, int], Tensor]:
        dataset, device = self.dataset, self.device
        seed, batch_size = self.request.seed, self.request.batch_size

        def images(first: int, count: int) -> Tensor:
            x1 = evaluate.noise(dataset.shape, count, seed, first).to(device)
            cond = self._labels(first, count)
            samples = evaluate.draw(self.net, sampler, x1, cond, seed, batch_size, first)
            return rounded(evaluate.decoded(dataset, samples), self.shape)

        return images

    def _labels(self, first: int, count: int) -> Cond | None:
        dataset, device = self.dataset, self.device
        rows = torch.arange(first, first + count)
        if not dataset.num_classes:
            return None
        if self.request.labels == "balanced":
            return {"label": (rows % dataset.num_classes).to(device)}
        found = dataset.sample_labels(self.request.num) or {}
        return {name: values[rows].to(device) for name, values in found.items()}


def open_samples(folder: Path, request: EvaluationRequest, cache: Path) -> Samples:
    """The samples of the finished run in `folder`, before any is drawn; `cache` is for features."""
    experiment, net = open_run(
        folder, request.bindings, weights=request.weights, trust_code=request.trust_code
    )
    # Taken at once, because the text grows with every part that gin builds from here on.
    operative = hashlib.sha256(gin_setup.operative_text().encode()).hexdigest()
    dataset = experiment.dataset
    code = evaluate.noise(dataset.shape, 1, request.seed).to(experiment.device)
    return Samples(
        request=request,
        dataset=dataset,
        real=lambda: training_data(experiment),
        device=experiment.device,
        net=net,
        samplers=samplers_at(experiment, request.nfe or experiment.nfe),
        shape=tuple(evaluate.decoded(dataset, code).shape[1:]),
        weights=remembered_sha256(request.weights or finished_run(folder)),
        operative=operative,
        cache=cache,
    )


def rounded(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pictures of this shape as uint8, as a file would hold them, and other data as they are."""
    return to_uint8(images) if is_picture(shape) else images


def rounding(shape: tuple[int, ...]) -> dict[str, str]:
    """What the key of cached features says about `rounded`."""
    return {"rounded": str(is_picture(shape))}
