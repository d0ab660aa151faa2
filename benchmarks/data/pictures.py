"""Samples as PNG files to look at: grids of pictures and scatter plots of points.

Samples are float [n c h w] in [-1, 1], or points [n 2]. `to_uint8` is the one rule by which the
project rounds pictures to pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from registry.protocols import is_picture as is_picture

SMALLEST_SIDE = 48  # pixels that the longer side of a picture in a grid has at least
GAP = 2  # pixels between pictures
COLUMNS = 12  # of panels with points, side by side


def to_uint8(x: Tensor) -> Tensor:
    """Turn values in [-1, 1] into pixels: round(127.5 (x + 1)), clamped to 0..255.

    A uint8 tensor holds pixels already and is given back as it is.
    """
    if x.dtype == torch.uint8:
        return x
    return (127.5 * (x.float() + 1)).round().clamp(0, 255).to(torch.uint8)


def save_grid(rows: Sequence[Tensor], path: str | Path, titles: Sequence[str] = ()) -> Path:
    """Write one PNG with a line of pictures for each of `rows` [n c h w], its title on the left.

    The rows are in [-1, 1]. Pictures under 48 pixels are enlarged by a whole factor and without
    smoothing, so that every pixel stays visible.
    """
    shapes = {tuple(row.shape[1:]) for row in rows}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"a grid needs rows [n c h w] of one shape with 1 or 3 channels, but got "
            f"{[tuple(row.shape) for row in rows]}; decode latents first"
        )
    if titles and len(titles) != len(rows):
        raise ValueError(
            f"got {len(titles)} titles for {len(rows)} rows; give one for each row, or none"
        )
    factor = -(-SMALLEST_SIDE // max(shape[1:]))
    height, width = (factor * side + GAP for side in shape[1:])
    font = ImageFont.load_default(size=14)
    margin = max((int(font.getlength(title)) + 4 * GAP for title in titles), default=0)
    columns = max(len(row) for row in rows)
    size = (margin + columns * width + GAP, len(rows) * height + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, row in enumerate(rows):
        canvas.paste(_strip(row, factor), (margin + GAP, i * height + GAP))
        if titles:
            middle = (2 * GAP, i * height + height // 2)
            draw.text(middle, titles[i], fill="black", font=font, anchor="lm")
    return _saved(canvas, Path(path))


def _strip(row: Tensor, factor: int) -> Image.Image:
    """The pictures of one row side by side, with white between them."""
    pixels = to_uint8(row.detach().cpu()).expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    pixels = torch.nn.functional.pad(pixels, (0, GAP), value=255)
    return Image.fromarray(np.ascontiguousarray(rearrange(pixels, "n c h w -> h (n w) c").numpy()))


def _saved(canvas: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")
    return path


def save_scatter(
    panels: Mapping[str, Tensor], path: str | Path, reference: Tensor | None = None
) -> Path:
    """Write one PNG with a panel for each title, which shows its points [n 2].

    The points of the reference are drawn below them in grey. All panels show the same square. It is
    half as wide again as the range of the reference, or as that of all points without a reference.
    A panel's title counts the points outside of it, and the points that are not finite.
    """
    from matplotlib.figure import Figure  # takes a second to import, and few runs need it

    clouds = {title: points.detach().cpu().float() for title, points in panels.items()}
    backdrop = None if reference is None else reference.detach().cpu().float()
    for points in [*clouds.values(), *([] if backdrop is None else [backdrop])]:
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"a scatter plot needs points [n 2], but got {tuple(points.shape)}")
    low, high = _square(torch.cat(list(clouds.values())) if backdrop is None else backdrop)
    columns = min(len(clouds), COLUMNS)
    lines = math.ceil(len(clouds) / columns)
    figure = Figure(figsize=(3 * columns, 3.2 * lines), dpi=120, layout="constrained")
    for i, (title, points) in enumerate(clouds.items()):
        axes = figure.add_subplot(lines, columns, i + 1)
        if backdrop is not None:
            axes.scatter(backdrop[:, 0].numpy(), backdrop[:, 1].numpy(), s=2, color="lightgrey")
        axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=2, color="tab:blue")
        inside = ((points >= low) & (points <= high)).all(1)
        outside = len(points) - int(inside.sum())
        axes.set_title(f"{title} ({outside} outside)" if outside else title, fontsize=9)
        axes.set_xlim(float(low[0]), float(high[0]))
        axes.set_ylim(float(low[1]), float(high[1]))
        axes.set_aspect("equal")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return Path(path)


def _square(points: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper corner of a square around the finite points.

    It is half as wide again as their range.
    """
    finite = points[points.isfinite().all(1)]
    if not len(finite):
        return torch.full((2,), -1.0), torch.full((2,), 1.0)
    low, high = finite.amin(0), finite.amax(0)
    half = 0.75 * (high - low).max().clamp(min=1e-3)
    return (low + high) / 2 - half, (low + high) / 2 + half


def picture(rows: Mapping[str, Tensor], path: Path, reference: Tensor | None = None) -> Path | None:
    """Write a grid of pictures or a scatter plot; None, and no file, for data of another shape."""
    shape = next(iter(rows.values())).shape[1:]
    if is_picture(shape):
        return save_grid(list(rows.values()), path, titles=list(rows))
    if is_points(shape):
        return save_scatter(rows, path, reference)
    return None


def is_points(shape: tuple[int, ...]) -> bool:
    return tuple(shape) == (2,)
