"""Runs that take a second: a tiny network on digits, pixel features, one's own MLflow store."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cli import main

DIGITS = "experiments/digits.gin"
ARMS = ("flow_matching", "mean_flow", "shortcut", "dumo", "decm")
NETWORK = (
    "run.backbone = @dit",
    "dit.patch = 2",
    "dit.dim = 16",
    "dit.depth = 1",
    "dit.num_heads = 2",
)
METRIC = ("run.metric = @feature_metrics()", "feature_metrics.extractor = @pixels()")
SIZES = (
    "run.steps = 4",
    "run.batch_size = 8",
    "run.num_samples = 12",
    "run.nfe = (1, 2)",
    "run.log_every = 1",
)
TINY = (*SIZES, *NETWORK, *METRIC)
# Points in space, of which no picture is drawn: with `mlp`, the cheapest data to run on.
SPACE = (
    "run.dataset = @gaussian()",
    "gaussian.mean = (0.6, -0.8, 0.1)",
    "gaussian.std = (0.6, 0.3, 0.5)",
    "run.backbone = @mlp",
    "mlp.dim = 8",
    "mlp.depth = 1",
)
FILE_ONLY = (*TINY, "run.recorder = @jsonl()")  # without MLflow


@dataclass(frozen=True)
class Done:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str


def zoo(*words: object, rehearsal: bool = False) -> Done:
    """The command line, in this process; `run` and `grid` without their rehearsal, which costs."""
    if words[0] in ("run", "grid") and not rehearsal:
        words = (*words, "--no-rehearsal")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return Done(status, out.getvalue(), err.getvalue())


def sets(*bindings: str) -> list[str]:
    return [word for binding in bindings for word in ("--set", binding)]


def entries(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "record.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def losses(folder: Path, name: str = "loss") -> dict[int, float]:
    """The recorded losses by step; a step that was done again counts as the last time."""
    found = [(e["step"], e["values"]) for e in entries(folder, "metrics")]
    return {step: values[name] for step, values in found if name in values}
