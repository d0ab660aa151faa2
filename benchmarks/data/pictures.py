"""Samples to look at: the one rounding rule to uint8, grids of pictures, scatter plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 48  # pixels that a picture in a grid covers at least
GAP = 2


def to_uint8(x: Tensor) -> Tensor:
    """round(127.5 (x + 1)), clamped to 0..255: the only way from [-1, 1] to pixels; pixels stay."""
    if x.dtype == torch.uint8:
        return x
    return (127.5 * (x.float() + 1)).round().clamp(0, 255).to(torch.uint8)


def save_grid(rows: Sequence[Tensor], path: str | Path, titles: Sequence[str] = ()) -> Path:
    """One PNG, a line for each of `rows` [n c h w] in [-1, 1], with its title on the left.

    Pictures under 48 pixels are enlarged by a whole factor without smoothing, so that every pixel
    stays visible.
    """
    shapes = {tuple(row.shape[1:]) for row in rows}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"a grid needs rows [n c h w] of one shape with 1 or 3 channels, got "
            f"{[tuple(row.shape) for row in rows]}; decode latents first"
        )
    if titles and len(titles) != len(rows):
        raise ValueError(f"{len(titles)} titles for {len(rows)} rows; give one for each, or none")
    factor = -(-CELL // max(shape[1:]))
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
    """One row of pictures side by side, white between them."""
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
    """One PNG with a panel of points [n 2] for each title, over the reference's in grey.

    All panels show the same square: the reference's range (without one, the points'), half as
    wide again. The title counts the points outside it, those that are not finite included.
    """
    from matplotlib.figure import Figure  # slow to import, and only 2-D runs need it

    clouds = {title: points.detach().cpu().float() for title, points in panels.items()}
    backdrop = None if reference is None else reference.detach().cpu().float()
    for points in [*clouds.values(), *([] if backdrop is None else [backdrop])]:
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"a scatter plot needs points [n 2], got {tuple(points.shape)}")
    low, high = _square(torch.cat(list(clouds.values())) if backdrop is None else backdrop)
    figure = Figure(figsize=(3 * len(clouds), 3.2), dpi=120, layout="constrained")
    for i, (title, points) in enumerate(clouds.items()):
        axes = figure.add_subplot(1, len(clouds), i + 1)
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
    """The corners of a square around the finite points, half as wide again as their range."""
    finite = points[points.isfinite().all(1)]
    if not len(finite):
        return torch.full((2,), -1.0), torch.full((2,), 1.0)
    low, high = finite.amin(0), finite.amax(0)
    half = 0.75 * (high - low).max().clamp(min=1e-3)
    return (low + high) / 2 - half, (low + high) / 2 + half


def picture(rows: Mapping[str, Tensor], path: Path, reference: Tensor | None = None) -> Path | None:
    """A grid of images, a scatter plot of 2-D points; None for data that are neither."""
    shape = next(iter(rows.values())).shape[1:]
    if is_picture(shape):
        return save_grid(list(rows.values()), path, titles=list(rows))
    if is_points(shape):
        return save_scatter(rows, path, reference)
    return None


def is_points(shape: tuple[int, ...]) -> bool:
    return tuple(shape) == (2,)


def is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3)
