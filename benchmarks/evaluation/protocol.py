"""The protocol of published tables, for a finished run: many samples, class-balanced, streamed.

Samples are drawn in blocks of 256, whose noise, labels and draws depend on the seed and the row
alone, so the numbers are those of any batch size and any number of processes (`--ranks 8`, or
torchrun's). Of each block only its features are kept, in

    OUT/features/                 see feature_cache.py; a killed evaluation continues
    OUT/evaluation.json           values, and everything that they depend on
    OUT/evaluation.md             the table

Both sides are rounded to uint8 first. Beside each distance stands what one half of the real images
scores against the other, at half their number.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import registry
from benchmarks.data.pictures import is_picture, to_uint8
from benchmarks.evaluation.feature_cache import FeatureSink, PngSink, Sink, fill
from benchmarks.evaluation.reference import Real, find_real
from benchmarks.evaluation.reference_checks import against, check_numbers, floors, possible, usable
from benchmarks.markdown import markdown
from benchmarks.metrics import evaluate
from benchmarks.metrics.distances import VectorMetric
from benchmarks.metrics.feature_metrics import named
from benchmarks.metrics.features import best_available
from benchmarks.records.provenance import provenance
from benchmarks.runs.finished import arm_of_run, open_run
from benchmarks.runs.result import finished_run
from registry import gin_setup
from registry.protocols import Cond, Extractor, Network, Sampler
from trainers import ranks
from trainers.checkpoints.whole_files import remembered_sha256, write_json

METRICS = ("frechet", "kid", "precision_recall")
EVALUATION = "evaluation.json"
CACHE_VARIABLE = "OBJECTIVE_ZOO_CACHE"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a run; empty tuples leave the choice: its own NFEs, what is possible."""

    num: int = 50_000
    nfe: tuple[int, ...] = ()
    metrics: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    reference: str | None = None
    labels: str = "balanced"  # or "data": with the frequencies of the data
    seed: int = 0
    batch_size: int = evaluate.BLOCK
    bindings: tuple[str, ...] = ()
    save_images: Path | None = None
    weights: Path | None = None  # a file to measure instead of the run's own
    cache: Path | None = None  # of the reference's features; None: the user's own

    def __post_init__(self) -> None:
        if self.num < 2 or self.batch_size < 1:
            raise ValueError(f"--num {self.num} --batch-size {self.batch_size}: at least 2 and 1")
        if self.labels not in ("balanced", "data"):
            raise ValueError(f"labels are 'balanced' or those of the 'data', not {self.labels!r}")

    @property
    def reference_cache(self) -> Path:
        usual = os.environ.get(CACHE_VARIABLE, "~/.cache/objective-zoo/features")
        return self.cache or Path(usual).expanduser()


def evaluate_run(folder: Path, request: Request, out: Path | None = None) -> dict[str, float]:
    """The values by name, also written under `out`, by default RUN/evaluation.

    Other weights than the run's own are measured into RUN/evaluation_NAME, after their file.

    Under torchrun every process takes its share; the first returns the values, the others nothing.
    """
    finished_run(folder)
    out = out or folder / (
        f"evaluation_{request.weights.stem}" if request.weights else "evaluation"
    )
    with _processes():
        evaluation = _Evaluation(folder, request, out)
        real, metrics = evaluation.real()
        evaluation.draw()
        values: dict[str, float] = {}
        if ranks.leads():
            values, notes = evaluation.measure(real, metrics)
            out.mkdir(parents=True, exist_ok=True)
            file = str(request.weights or finished_run(folder))
            about = {"run": str(folder), "weights_file": file, **evaluation.about()}
            about |= {"values": values, **notes}
            write_json(out / EVALUATION, about)
            (out / EVALUATION).with_suffix(".md").write_text(table(values))
        ranks.gathered(None)  # one that leaves early would be missed
        return values


@contextmanager
def _processes() -> Iterator[None]:
    """Meet the other processes, if torchrun started this one as one of several."""
    if not ranks.launched():
        yield
        return
    ranks.join(minutes=24 * 60)  # they only wait for each other: torchrun ends all when one fails
    try:
        yield
    finally:
        ranks.leave()


def table(values: Mapping[str, float]) -> str:
    """One line for each NFE, then what real images score."""
    names = [name.split("/")[1] for name in values if "/" in name]
    names = list(dict.fromkeys(names))
    nfes = list(dict.fromkeys(name.split("/")[0] for name in values if "/" in name))
    rows = [[nfe.upper().replace("NFE", "NFE "), *_cells(values, nfe, names)] for nfe in nfes]
    real = [
        next((f"{values[key]:.4g}" for key in (f"{n}_floor", f"{n}_ceiling") if key in values), "-")
        for n in names
    ]
    return markdown(["", *names], [*rows, ["real halves", *real]])


def _cells(values: Mapping[str, float], nfe: str, names: Sequence[str]) -> list[str]:
    return [f"{values[f'{nfe}/{name}']:.4g}" for name in names]


class _Evaluation:
    """One evaluation while it lasts: the run that is measured and what is kept of its samples."""

    def __init__(self, folder: Path, request: Request, out: Path):
        self.request, self.out = request, out
        self.experiment, self.net = open_run(folder, request.bindings, weights=request.weights)
        built = gin_setup.operative_text().encode()
        self.operative = hashlib.sha256(built).hexdigest()  # what the weights are weights of
        self.weights = remembered_sha256(request.weights or finished_run(folder))
        self.samplers = evaluate.samplers_for(
            self.experiment.sampler, request.nfe or self.experiment.nfe
        )
        self.shape = tuple(evaluate.seen(self.experiment.dataset, self._codes(1)).shape[1:])
        names = request.features
        self.extractors: list[Extractor] = [registry.extractors.build(name) for name in names]
        self.extractors = self.extractors or [best_available(self.shape)]
        self.metrics = [registry.metrics.build(name) for name in request.metrics or METRICS]
        self._check()

    def _check(self) -> None:
        wrong = [m for m in self.metrics if not hasattr(m, "against")]
        if wrong:
            raise ValueError(f"{wrong[0]} is no metric of features; take one of {METRICS}")
        asked = set(gin_setup.bindings_of("\n".join(self.request.bindings)))
        if unused := sorted(asked & {*gin_setup.inert_bindings(arm_of_run())}):
            raise ValueError(f"nothing uses {', '.join(unused)} in this evaluation")
        num_classes, num = self.experiment.dataset.num_classes, self.request.num
        if num_classes and self.request.labels == "balanced" and num % num_classes:
            log.warning(
                "%d samples are not the same number of each of %d classes", num, num_classes
            )

    def _codes(self, n: int) -> Tensor:
        dataset, seed = self.experiment.dataset, self.request.seed
        return evaluate.noise(dataset.shape, n, seed).to(self.experiment.device)

    def about(self) -> dict[str, Any]:
        """What all the values depend on."""
        return {
            "samples": self.request.num,
            "seed": self.request.seed,
            "labels": self._label_rule(),
            "weights": self.weights,
            "shape": self.shape,
            "rounding": "uint8: round(127.5 (x + 1)), clipped" if self._pictures() else "none",
            "metrics": [repr(metric) for metric in self.metrics],
            "processes": ranks.count(),
            "bindings": list(self.request.bindings),
            "operative": f"sha256 {self.operative}",
            "code": provenance(),
        }

    def _label_rule(self) -> str:
        if not self.experiment.dataset.num_classes:
            return "none"
        if self.request.labels == "balanced":
            return f"row i has class i mod {self.experiment.dataset.num_classes}"
        return f"with the frequencies of the data, for {self.request.num}"

    def _pictures(self) -> bool:
        return is_picture(self.shape)

    def real(self) -> tuple[list[tuple[Real, Tensor | None]], list[list[VectorMetric]]]:
        """For each extractor the real side, with its features, and the metrics that it allows."""
        real = find_real(
            self.request.reference, self.experiment.dataset, self.shape, self.request.num
        )
        sides, allowed = [], []
        for extractor in self.extractors:
            # Before anything is sampled: the weights fit, and the reference has what is asked for.
            blank = self._rounded(torch.zeros(1, *self.shape)).to(self.experiment.device)
            dim = extractor(blank).shape[1]
            one = usable(real, extractor, dim)
            metrics = possible(self.metrics, one, bool(self.request.metrics))
            target = self._real_features(one, extractor)
            check_numbers(metrics, self.request.num, dim, one, target)
            allowed.append(metrics)
            sides.append((one, target))
        return sides, allowed

    def _real_features(self, real: Real, extractor: Extractor) -> Tensor | None:
        if real.features is not None or real.images is None:
            return real.features
        sink = FeatureSink(
            cache=self.request.reference_cache,
            about={"images": real.about, **self._rounding(), **extractor.provenance()},
            num=real.num,
            extractor=extractor,
        )

        def images(first: int, count: int) -> Tensor:
            assert real.images is not None
            return self._rounded(real.images(first, count)).to(self.experiment.device)

        fill([sink], real.num, images, f"real images, {extractor.label}")
        return sink.load() if ranks.leads() else None

    def draw(self) -> None:
        """Samples at every NFE, of which the sinks keep their part."""
        sinks = {nfe: self._sinks(nfe, sampler) for nfe, sampler in self.samplers.items()}
        for nfe, sampler in self.samplers.items():
            fill(sinks[nfe], self.request.num, self._images(sampler), f"NFE {nfe}")

    def _sinks(self, nfe: int, sampler: Sampler) -> list[Sink]:
        sinks: list[Sink] = [self._sink(sampler, extractor) for extractor in self.extractors]
        if self.request.save_images:
            pictures = PngSink(
                folder=self.request.save_images / f"nfe{nfe}",
                about={"samples": str(self.request.num), **self._made_by(sampler)},
                num=self.request.num,
            )
            pictures.claim()
            sinks.append(pictures)
        return sinks

    def _made_by(self, sampler: Sampler) -> dict[str, str]:
        return {
            "weights": self.weights,
            "operative": self.operative,
            "sampler": repr(sampler),
            "seed": str(self.request.seed),
            "labels": self._label_rule(),
            "data": self.experiment.dataset.identity(),
            **self._rounding(),
        }

    def _sink(self, sampler: Sampler, extractor: Extractor) -> FeatureSink:
        return FeatureSink(
            cache=self.out / "features",
            about={**self._made_by(sampler), **extractor.provenance()},
            num=self.request.num,
            extractor=extractor,
        )

    def _rounding(self) -> dict[str, str]:
        return {"rounded": str(self._pictures())}

    def _images(self, sampler: Sampler) -> Any:
        experiment, request = self.experiment, self.request
        net: Network = self.net

        def images(first: int, count: int) -> Tensor:
            dataset, device = experiment.dataset, experiment.device
            x1 = evaluate.noise(dataset.shape, count, request.seed, first).to(device)
            samples = evaluate.draw(
                net, sampler, x1, self._labels(first, count), request.seed,
                request.batch_size, first,
            )  # fmt: skip
            return self._rounded(evaluate.seen(dataset, samples))

        return images

    def _labels(self, first: int, count: int) -> Cond | None:
        dataset, rows = self.experiment.dataset, torch.arange(first, first + count)
        if not dataset.num_classes:
            return None
        if self.request.labels == "balanced":
            return {"label": (rows % dataset.num_classes).to(self.experiment.device)}
        found = dataset.sample_labels(self.request.num) or {}
        return {name: values[rows].to(self.experiment.device) for name, values in found.items()}

    def _rounded(self, images: Tensor) -> Tensor:
        return to_uint8(images) if self._pictures() else images

    def measure(
        self, sides: Sequence[tuple[Real, Tensor | None]], allowed: Sequence[list[VectorMetric]]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """All values, and what each extractor's depend on."""
        values: dict[str, float] = {}
        real_values: dict[str, float] = {}
        notes: dict[str, Any] = {}
        for extractor, (real, target), metrics in zip(self.extractors, sides, allowed, strict=True):
            judges = [against(metric, real, target) for metric in metrics]
            for nfe, sampler in self.samplers.items():
                features = self._sink(sampler, extractor).load()
                for judge in judges:
                    for name, value in judge(features):
                        values[f"nfe{nfe}/{named(name, extractor)}"] = value
            real_values |= dict(floors(metrics, target, extractor))
            notes[extractor.label] = {
                "reference": real.about,
                "reference_rows": "statistics" if target is None else len(target),
                "floor": "even rows of the reference against odd ones"
                if target is not None
                else "",
                **extractor.provenance(),
            }
        return values | real_values, {"features": notes}
