"""The sample viewer: what each row made of the same noise and labels, at every NFE and step kept.

Pictures come as strips, one column for each noise, and beside the final ones their nearest training
pictures (see benchmarks/runs/samples.py). Points come as small scatter plots over real points. One
seed is shown, the lowest that most rows have, and at most MAX_STEPS checkpoints, so that the page
stays small. What lies in the folders is shown; nothing is drawn from a network.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from benchmarks.report.reading.comparability import Section
from benchmarks.report.reading.recorded_runs import RecordedCell
from benchmarks.runs.result import REAL, SAMPLES

NUM_COLUMNS = 10
MAX_STEPS = 12
CELL = 40  # pixels that a picture covers at least
GAP = 2
_SIDE = 220  # pixels of a scatter plot
_INK, _REAL_INK = (0, 114, 178, 200), (140, 140, 140, 110)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """What one row shows at one NFE: pictures by step as data URIs, the last being the end."""

    group: str
    nfe: int
    by_step: Mapping[int, str]
    nearest: str = ""  # data URI of the nearest training pictures of the final samples
    distances: tuple[float, ...] = ()

    @property
    def final(self) -> str:
        return self.by_step[max(self.by_step)]


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """All strips of a section; `real_distance` is the median between training pictures."""

    seed: int
    points: bool
    strips: tuple[Strip, ...]
    labels: tuple[int, ...]
    steps: tuple[int, ...]
    real_distance: float | None
    width: int

    @property
    def nfes(self) -> tuple[int, ...]:
        return tuple(sorted({strip.nfe for strip in self.strips}))

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(strip.group for strip in self.strips))


def viewer_of(section: Section) -> Viewer | None:
    """None where nothing that can be shown was kept."""
    kept = [c for c in section.cells if (c.folder / SAMPLES).exists() and _drawable(_final(c))]
    if not kept:
        return None
    counts = Counter(cell.seed for cell in kept)
    seed = min(counts, key=lambda s: (-counts[s], s))
    cells = [cell for cell in kept if cell.seed == seed]
    real = next((r for cell in cells if (r := _real(cell))), {})
    by_step = {cell.group: _kept(cell) for cell in cells}
    strips = [
        _strip(cell, nfe, by_step[cell.group], real)
        for cell in cells
        for nfe in sorted(int(name[3:]) for name in _final(cell))
    ]
    far = real.get("real_distance")
    sample = next(iter(_final(cells[0]).values()))
    return Viewer(
        seed=seed,
        points=sample.ndim == 2,
        strips=tuple(strips),
        labels=tuple(real["label"][:NUM_COLUMNS].tolist()) if "label" in real else (),
        steps=tuple(sorted({step for strip in strips for step in strip.by_step})),
        real_distance=None if far is None else float(np.median(far)),
        width=_SIDE if sample.ndim == 2 else _factor(sample) * sample.shape[-1] + GAP,
    )


def _final(cell: RecordedCell) -> dict[str, Array]:
    return dict(load_file(cell.folder / SAMPLES))


def _real(cell: RecordedCell) -> dict[str, Array]:
    path = cell.folder / REAL
    return dict(load_file(path)) if path.exists() else {}


def _drawable(samples: Mapping[str, Array]) -> bool:
    shape = next(iter(samples.values())).shape[1:]
    return shape == (2,) or (len(shape) == 3 and shape[0] in (1, 3))


def _kept(cell: RecordedCell) -> dict[int, dict[str, Array]]:
    """The samples by step, some of the checkpoints and always the end."""
    files = {int(f.stem[5:]): f for f in sorted((cell.folder / "samples").glob("step_*"))}
    end = int(next(iter(cell.record.metrics[k] for k in cell.result.values)).steps[-1])
    files.pop(end, None)
    chosen: list[tuple[int, Path]] = list(files.items())
    if len(chosen) >= MAX_STEPS:
        places = np.linspace(0, len(chosen) - 1, MAX_STEPS - 1).round().astype(int)
        chosen = [chosen[i] for i in dict.fromkeys(places.tolist())]
    return {**{step: dict(load_file(file)) for step, file in chosen}, end: _final(cell)}


def _strip(
    cell: RecordedCell,
    nfe: int,
    by_step: Mapping[int, Mapping[str, Array]],
    real: Mapping[str, Array],
) -> Strip:
    name = f"nfe{nfe}"
    own = _real(cell)
    backdrop = real.get("real")
    drawn = {step: _picture(samples[name], backdrop) for step, samples in by_step.items()}
    if f"nearest_{name}" not in own:
        return Strip(group=cell.group, nfe=nfe, by_step=drawn)
    return Strip(
        group=cell.group,
        nfe=nfe,
        by_step=drawn,
        nearest=_pictures(own[f"nearest_{name}"]),
        distances=tuple(own[f"distance_{name}"][:NUM_COLUMNS].tolist()),
    )


def _picture(samples: Array, backdrop: Array | None) -> str:
    return _scatter(samples, backdrop) if samples.ndim == 2 else _pictures(samples)


def _pictures(rows: Array) -> str:
    """The first pictures [n c h w] side by side, enlarged by a whole factor without smoothing."""
    from benchmarks.data.pictures import to_uint8

    if rows.dtype != np.uint8:
        import torch

        rows = to_uint8(torch.from_numpy(rows)).numpy()
    factor = _factor(rows)
    rows = rows[:NUM_COLUMNS].repeat(factor, 2).repeat(factor, 3)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, 0), (0, GAP)))
    sheet = rows.transpose(2, 0, 3, 1).reshape(rows.shape[2], -1, rows.shape[1])
    opaque = np.full((*sheet.shape[:2], 1), 255, np.uint8)
    for column in range(1, 1 + len(rows)):
        opaque[:, column * rows.shape[3] - GAP : column * rows.shape[3]] = 0
    colours = np.broadcast_to(sheet, (*sheet.shape[:2], 3)) if sheet.shape[2] == 1 else sheet
    return _uri(Image.fromarray(np.concatenate([colours, opaque], axis=2), "RGBA"))


def _factor(rows: Array) -> int:
    return max(1, -(-CELL // max(rows.shape[2:])))


def _scatter(points: Array, backdrop: Array | None) -> str:
    """Points over real ones in grey; the square is the real points', half as wide again."""
    base = points if backdrop is None else backdrop
    base = base[np.isfinite(base).all(1)]
    centre = (base.min(0) + base.max(0)) / 2
    scale = _SIDE / (1.5 * max(float((base.max(0) - base.min(0)).max()), 1e-3))
    canvas = np.zeros((_SIDE, _SIDE, 4), np.uint8)
    for cloud, ink in ((backdrop, _REAL_INK), (points[:1000], _INK)):
        if cloud is None:
            continue
        places = ((cloud[np.isfinite(cloud).all(1)] - centre) * scale + _SIDE / 2).round()
        inside = places[((places >= 1) & (places < _SIDE - 1)).all(1)].astype(int)
        for dx in (0, 1):
            for dy in (0, 1):
                canvas[_SIDE - 1 - inside[:, 1] - dy, inside[:, 0] + dx] = ink
    return _uri(Image.fromarray(canvas, "RGBA"))


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
