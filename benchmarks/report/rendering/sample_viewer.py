"""The sample viewer: what each row made of the same noise and labels, at every NFE and step kept.

Pictures come as strips, one column for each noise, and beside the final ones their nearest training
pictures (see benchmarks/runs/samples.py). Points come as small scatter plots over real points. The
viewer shows what the runs kept; nothing is drawn from a network.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.report.reading.kept_samples import Array, KeptSamples

NUM_COLUMNS = 10
CELL = 40  # pixels that a picture covers at least
GAP = 2
_SIDE = 220  # pixels of a scatter plot
_INK, _REAL_INK = (0, 114, 178, 200), (140, 140, 140, 110)


@dataclass(frozen=True, kw_only=True)
class Strip:
    """What one row shows at one NFE: pictures by step as data URIs, the last being the end."""

    group: str
    nfe: int
    by_step: Mapping[int, str]
    nearest: str = ""  # data URI of the nearest training pictures of the final samples
    distances: tuple[float, ...] = ()
    as_sharp: float | None = None  # the median distance of training pictures as sharp as these

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


def viewer_of(kept: Sequence[KeptSamples]) -> Viewer | None:
    """The samples of the rows side by side; None where no row kept any."""
    if not kept:
        return None
    real = next((samples.real for samples in kept if samples.real), {})
    strips = [_strip(samples, nfe, real) for samples in kept for nfe in samples.nfes]
    sample = next(iter(kept[0].final.values()))
    return Viewer(
        seed=kept[0].seed,
        points=sample.ndim == 2,
        strips=tuple(strips),
        labels=tuple(real["label"][:NUM_COLUMNS].tolist()) if "label" in real else (),
        steps=tuple(sorted({step for strip in strips for step in strip.by_step})),
        real_distance=_median(real.get("real_distance")),
        width=_SIDE if sample.ndim == 2 else _factor(sample) * sample.shape[-1] + GAP,
    )


def _strip(kept: KeptSamples, nfe: int, real: Mapping[str, Array]) -> Strip:
    name = f"nfe{nfe}"
    backdrop = real.get("real")
    drawn = {step: _picture(samples[name], backdrop) for step, samples in kept.by_step.items()}
    if f"nearest_{name}" not in kept.real:
        return Strip(group=kept.group, nfe=nfe, by_step=drawn)
    return Strip(
        group=kept.group,
        nfe=nfe,
        by_step=drawn,
        nearest=_pictures(kept.real[f"nearest_{name}"]),
        distances=tuple(kept.real[f"distance_{name}"][:NUM_COLUMNS].tolist()),
        as_sharp=_median(kept.real.get(f"as_sharp_{name}")),
    )


def _median(values: Array | None) -> float | None:
    return None if values is None else float(np.median(values))


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
    """Points over real ones in grey, in a square half as wide again as the real points are."""
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
