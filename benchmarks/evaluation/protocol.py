"""The protocol of published tables, for a finished run: many samples, class-balanced, streamed.

`evaluate_run` goes through three steps: it draws samples (samples.py), looks up the real side
(real_side.py) and works out values from the features of both (scores.py). It writes

    OUT/features/                 see feature_cache.py; a killed evaluation continues
    OUT/evaluation.json           values, and everything that they depend on (kept_evaluations.py)
    OUT/evaluation.md             the tables

and adds the values to the run's record, and so to MLflow, as `evaluation/ID/nfe4/fid`; the tag
`evaluation.ID` says how they were measured.

Both sides are rounded to uint8 first. Beside each distance stands what one half of the real images
scores against the other, at half their number. Under torchrun, or with `--ranks 8`, every process
draws a share of the samples, and the values are the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import registry
from benchmarks.data.pictures import is_picture
from benchmarks.evaluation.kept_evaluations import OTHERS, how, identity, joined, kept
from benchmarks.evaluation.real_side import real_sides
from benchmarks.evaluation.request import EvaluationRequest
from benchmarks.evaluation.samples import Samples, open_samples
from benchmarks.evaluation.scores import scores
from benchmarks.locks import locked
from benchmarks.markdown import markdown
from benchmarks.metrics.distances import VectorMetric
from benchmarks.metrics.features import best_available
from benchmarks.records.afterwards import add_to_record
from benchmarks.records.provenance import provenance
from benchmarks.runs.finished import check_used
from benchmarks.runs.result import Result, finished_run
from registry.folders import check_output
from registry.protocols import Extractor
from trainers import ranks
from trainers.checkpoints.whole_files import write_json, write_text

METRICS = ("frechet", "kid", "precision_recall")
EVALUATION, LOCK = "evaluation.json", "evaluation.lock"

log = logging.getLogger(__name__)


def evaluate_run(
    folder: Path, request: EvaluationRequest, out: Path | None = None
) -> dict[str, float]:
    """The values by name, also added to what is under `out`, by default RUN/evaluation.

    Other weights than the run's own are measured into RUN/evaluation_NAME, after their file.

    Under torchrun every process takes its share; the first returns the values, the others nothing.
    """
    own = finished_run(folder)
    out = out or folder / (
        f"evaluation_{request.weights.stem}" if request.weights else "evaluation"
    )
    check_output(out, "--out", folder=True)
    if request.save_images:
        check_output(request.save_images, "--save-images", folder=True)
    kept(out / EVALUATION)  # raises now, and not after the samples, if it cannot be read
    with _processes():
        samples = open_samples(folder, request, cache=out / "features")
        extractors = _extractors(request, samples.shape)
        metrics = _metrics(request)
        _check(request, samples)
        sides = real_sides(samples, extractors, metrics)
        samples.draw(extractors)
        values: dict[str, float] = {}
        if ranks.leads():
            values = scores(samples, sides)
            about = {
                "run": str(folder),
                "weights_file": str(request.weights or own),
                **_about(samples, metrics),
                "values": values,
                "features": {side.extractor.label: side.about() for side in sides},
            }
            _keep(folder, out, about)
        ranks.gathered(None)  # a process that left early would be missed by the others
        return values


def _keep(folder: Path, out: Path, about: Mapping[str, Any]) -> None:
    """Add an evaluation to the files in `out` and to the record of the run."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / EVALUATION
    with locked(out / LOCK):
        content = joined(about, kept(path))
        write_json(path, content)
        tables = [table(content["values"])]
        for other in content[OTHERS]:
            tables += [f"Measured in another way, {identity(other)}:", table(other["values"])]
        write_text(path.with_suffix(".md"), "\n\n".join(tables) + "\n")
    result = Result.load(folder)
    made = json.loads(json.dumps(about))
    add_to_record(
        folder,
        tags={
            f"evaluation.{identity(made)}": json.dumps({**how(made), "sampler": made["sampler"]})
        },
        metrics={f"evaluation/{identity(made)}/{k}": v for k, v in about["values"].items()},
        step=result.steps - result.teacher_steps,
        files=[path, path.with_suffix(".md")],
    )


def _extractors(request: EvaluationRequest, shape: tuple[int, ...]) -> list[Extractor]:
    chosen: list[Extractor] = [registry.extractors.build(name) for name in request.features]
    return chosen or [best_available(shape)]


def _metrics(request: EvaluationRequest) -> list[VectorMetric]:
    """The metrics that are asked for; ValueError for one that does not compare features."""
    names = request.metrics or METRICS
    found = [registry.metrics.build(name) for name in names]
    for name, metric in zip(names, found, strict=True):
        if not isinstance(metric, VectorMetric):
            raise ValueError(
                f"the metric {name!r} does not compare features. Take some of "
                f"{', '.join(METRICS)}, or a metric of your own that is a VectorMetric "
                "(benchmarks/metrics/distances.py)"
            )
    return found


def _check(request: EvaluationRequest, samples: Samples) -> None:
    """ValueError for a binding that no built part uses; a warning for classes of unequal size."""
    check_used(request.bindings, "this evaluation")
    num_classes, num = samples.dataset.num_classes, request.num
    if num_classes and request.labels == "balanced" and num % num_classes:
        log.warning("%d samples are not the same number of each of %d classes", num, num_classes)


def _about(samples: Samples, metrics: Sequence[VectorMetric]) -> dict[str, Any]:
    """What all the values depend on."""
    picture = is_picture(samples.shape)
    return {
        "samples": samples.request.num,
        "seed": samples.request.seed,
        "labels": samples.label_rule,
        "weights": samples.weights,
        "sampler": {str(nfe): repr(sampler) for nfe, sampler in samples.samplers.items()},
        "shape": samples.shape,
        "rounding": "uint8: round(127.5 (x + 1)), clipped" if picture else "none",
        "metrics": [repr(metric) for metric in metrics],
        "processes": ranks.count(),
        "bindings": list(samples.request.bindings),
        "operative": f"sha256 {samples.operative}",
        "code": provenance(),
    }


@contextmanager
def _processes() -> Iterator[None]:
    """Join the other processes, if torchrun started this one together with them."""
    if not ranks.launched():
        yield
        return
    ranks.join(minutes=24 * 60)  # they only wait for each other: torchrun ends all when one fails
    try:
        yield
    finally:
        ranks.leave()


def table(values: Mapping[str, float]) -> str:
    """A Markdown table with a line for each NFE, and one for what real images score."""
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
    found = [values.get(f"{nfe}/{name}") for name in names]
    return ["-" if value is None else f"{value:.4g}" for value in found]
