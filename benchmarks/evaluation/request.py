"""The settings of an evaluation: what to measure of a run, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.metrics.evaluate import BLOCK

CACHE_VARIABLE = "OBJECTIVE_ZOO_CACHE"


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What to measure of a run, and how.

    Without `nfe` the run's own NFEs are measured, without `features` the best extractor whose
    weights are here is taken, and without `metrics` all of those that the reference allows.
    """

    num: int = 50_000
    nfe: tuple[int, ...] = ()
    metrics: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    reference: str | None = None  # see reference.py; None: the data that the run was trained on
    labels: str = "balanced"  # or "data": with the frequencies of the data
    seed: int = 0
    batch_size: int = BLOCK
    bindings: tuple[str, ...] = ()
    save_images: Path | None = None
    weights: Path | None = None  # a file to measure instead of the run's own
    cache: Path | None = None  # of the reference's features; None: the user's own
    trust_code: bool = False  # import the Python code that the run's configuration names

    def __post_init__(self) -> None:
        if self.num < 2 or self.batch_size < 1:
            raise ValueError(
                f"--num is {self.num} and --batch-size is {self.batch_size}; give at least 2 "
                "samples and batches of at least 1"
            )
        if self.labels not in ("balanced", "data"):
            raise ValueError(f"--labels is {self.labels!r}; it must be 'balanced' or 'data'")

    @property
    def reference_cache(self) -> Path:
        usual = os.environ.get(CACHE_VARIABLE, "~/.cache/objective-zoo/features")
        return self.cache or Path(usual).expanduser()
