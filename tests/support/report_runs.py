"""Records of runs that never ran, written by the project's own recorder, for the report to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.records.recorders import Jsonl
from benchmarks.report.reading.origins import origins_of
from benchmarks.report.reading.recorded_runs import read_runs
from benchmarks.report.rendering.data_frame import to_csv
from benchmarks.report.rendering.html import to_page
from benchmarks.report.rendering.markdown import to_markdown
from benchmarks.report.rendering.styles import styles_of
from benchmarks.report.tables import build_report
from benchmarks.runs.result import Result

NFES = (1, 2)
MEASURED = {
    "data": "digits: 1797 x (1, 8, 8), sha256 4e5f6c511bbc9ef0",
    "guidance": "none",
    "measured.samples": "64",
    "measured.features": "Pixels, flattened",
    "measured.resize": "none",
    "measured.rounding": "none",
    "measured.metrics": "Frechet()",
    "commit": "0123456789abcdef",
    "version.torch": "2.14.1",
}
SETTINGS = {
    "run.steps": "%STEPS",
    "run.images": "None",
    "run.seconds": "None",
    "run.batch_size": "8",
    "run.schedule": "@cosine()",
    "cosine.final": "0.0",
    "cosine.warmup_steps": "10",
    "STEPS": "20",
}


def cell(
    parent: Path,
    arm: str,
    seed: int,
    values: Mapping[str, float],
    *,
    objective: str = "",
    tags: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    points: bool = False,
) -> Path:
    """A finished cell below `parent`, with two evaluations and their samples."""
    folder = parent / f"{arm}-{seed}"
    measured = {**MEASURED, "measured.reference": f"64 rows of seed {seed}"}
    bound = {**SETTINGS, **(settings or {})}
    objective = objective or arm
    with Jsonl().start(arm, folder, parent, {"arm": arm, "objective": objective}) as record:
        record.tags({**measured, **(tags or {})})
        params = {k: bound[v[1:]] if v.startswith("%") else v for k, v in bound.items() if "." in k}
        record.params({**params, f"{objective}.path": "@linear()", "run.seed": seed})
        record.text("".join(f"{k} = {v}\n" for k, v in bound.items()), "operative.gin")
        record.text("# all of it\n", "config.gin")
        for step in (5, 10, 20):
            spent = {"loss": 1 / step, "images": 8.0 * step, "seconds": 0.1 * step}
            record.metrics({**spent, "terms/u": 2 / step, "grad_norm": 3.0}, step)
        record.metrics({key: 2 * value for key, value in values.items()}, 10)
        record.metrics(values, 20)
        cost = {"seconds_per_step": 0.1 + 0.1 * seed, "seconds": 2.0, "steps": 20, "images": 160}
        record.metrics({f"cost/{name}": value for name, value in cost.items()}, 20)
        keep(folder, points)
        Result(
            name=arm,
            objective=objective,
            backbone="dit",
            sampler="flow_map",
            seed=seed,
            values=dict(values),
            num_params=1000,
            steps=20,
            images=160,
            seconds=2.0,
        ).save(folder)
    return folder


def keep(folder: Path, points: bool) -> None:
    """Samples at step 10 and at the end, and the real data beside them."""
    rng = torch.Generator().manual_seed(0)
    shape = (12, 2) if points else (12, 1, 8, 8)
    final = {f"nfe{n}": torch.randn(shape, generator=rng) for n in NFES}
    save_file(final, folder / "samples.safetensors")
    (folder / "samples").mkdir()
    grey = {name: torch.full(shape, 128, dtype=torch.uint8) for name in final}
    save_file(final if points else grey, folder / "samples" / "step_00000010.safetensors")
    real = {"real": torch.randn(40, 2, generator=rng)} if points else {"label": torch.arange(12)}
    if not points:
        real["real_distance"] = torch.tensor([1.0, 2.0, 3.0])
        real |= {f"as_sharp_{name}": torch.tensor([0.25, 0.5, 4.0]) for name in grey}
        real |= {f"nearest_{name}": grey[name] for name in grey}
        real |= {f"distance_nfe{n}": torch.full((12,), float(n)) for n in NFES}
    save_file(real, folder / "real.safetensors")


def values(*by_nfe: float, floor: float = 0.5) -> dict[str, float]:
    """A distance at each of NFES, and what real data score."""
    found = {f"nfe{n}/fd_pixels": v for n, v in zip(NFES, by_nfe, strict=True)}
    return {**found, "fd_pixels_floor": floor}


def comparison(folder: Path, rows: Mapping[str, Mapping[int, dict[str, float]]], **more) -> Path:
    """A comparison: {arm: {seed: values}}."""
    with Jsonl().start(folder.name, folder):
        for arm, by_seed in rows.items():
            for seed, found in by_seed.items():
                cell(folder, arm, seed, found, **more)
    return folder


def unfinished(parent: Path, arm: str, error: Exception | None = None, **tags: str) -> Path:
    """A cell that failed with `error`, or that was pruned."""
    folder = parent / f"{arm}-unfinished"
    record = Jsonl().start(arm, folder, parent, {"arm": arm, "objective": arm})
    record.metrics({"loss": 1.0}, 7)
    record.tags(tags)
    if error:
        record.tags({"error": f"{type(error).__name__}: {error}"})
    record.close("FAILED" if error else "KILLED")
    return folder


def prepared(parent: Path, name: str) -> Path:
    """A cell that a grid prepared, and nobody began."""
    folder = parent / name
    folder.mkdir()
    tags = {"arm": name, "group": name, "cell.command": f"objective-zoo run {name}.gin"}
    text = json.dumps({"name": name, "id": "0", "arm": name, "headline": "", "tags": tags})
    (folder / "cell.json").write_text(text)
    return folder


ROWS = {
    # mean_flow is ahead by 10 in every seed at NFE 1; at NFE 2 it is ahead once, behind twice.
    "flow_matching": {0: values(100.0, 50.0), 1: values(200.0, 60.0), 2: values(300.0, 70.0)},
    "mean_flow": {0: values(90.0, 55.0), 1: values(190.5, 50.0), 2: values(289.5, 75.0)},
}


def table(runs: Path | list[Path], **options):
    """The entries of a report's first table: {NFE label: {row: entry}}."""
    report = build_report(read_runs(runs if isinstance(runs, list) else [runs]), **options)
    return {column.label: column.entries for column in report.compared[0].tables[0].columns}


def outputs(report) -> dict[str, str]:
    """The page, without figures, and the two other texts."""
    origins = origins_of(report.runs.cells)
    figures = {i: [] for i in range(len(report.compared))}
    page = to_page(report, origins, figures, {}, styles_of(report.runs.groups))
    return {"page": page, "markdown": to_markdown(report, origins), "csv": to_csv(report)}
