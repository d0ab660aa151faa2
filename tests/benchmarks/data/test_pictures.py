"""Rounding to pixels, and pictures of samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.data.pictures import save_grid, save_scatter, to_uint8


def test_to_uint8_inverts_the_normalisation_of_every_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() * (2 / 255) - 1), levels)


@given(st.floats(-3, 3, width=32))
def test_to_uint8_rounds_to_the_nearest_level_and_clamps(x):
    exact = min(max(127.5 * (x + 1), 0.0), 255.0)
    # half a level, and float32 rounding at 255
    assert abs(int(to_uint8(torch.tensor(x))) - exact) <= 0.5 + 1e-4


def test_to_uint8_takes_half_precision():
    x = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.bfloat16)
    assert to_uint8(x).tolist() == [0, 191, 255]


def test_save_grid_enlarges_by_whole_pixels_without_smoothing(tmp_path):
    rows = [torch.full((2, 1, 8, 8), -1.0), torch.full((1, 1, 8, 8), 1.0)]
    rows[0][1, 0, 0, 0] = 0.2  # round(153)
    path = save_grid(rows, tmp_path / "new" / "grid.png")
    pixels = np.array(Image.open(path))
    assert pixels.shape == (2 * 50 + 2, 2 * 50 + 2, 3)  # cells of 6 x 8 pixels, gaps of 2
    assert (pixels[2:50, 2:50] == 0).all()
    assert (pixels[2:8, 52:58] == 153).all()
    assert (pixels[2:50, 58:100] == 0).all()
    assert (pixels[52:] == 255).all()


def test_save_grid_keeps_colours_and_large_pictures_as_they_are(tmp_path):
    x = torch.full((1, 3, 64, 48), -1.0)
    x[:, 0, 5, 7] = 1.0
    pixels = np.array(Image.open(save_grid([x], tmp_path / "grid.png")))
    assert pixels.shape == (64 + 4, 48 + 4, 3)
    assert pixels[7, 9].tolist() == [255, 0, 0]


def test_save_grid_writes_titles_beside_their_rows(tmp_path):
    rows = [torch.ones(1, 1, 8, 8)] * 2
    path = save_grid(rows, tmp_path / "grid.png", titles=["", "flow map, 1 NFE"])
    pixels = np.array(Image.open(path))
    assert pixels.shape[1] > 100
    assert (pixels[:50] == 255).all()  # no title, white samples
    assert (pixels[52:, :-50] < 128).any()


@pytest.mark.parametrize(
    "rows", [[], [torch.zeros(1, 4, 8, 8)], [torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8)]]
)
def test_save_grid_rejects_what_is_no_picture(tmp_path, rows):
    with pytest.raises(ValueError, match="one shape with 1 or 3 channels"):
        save_grid(rows, tmp_path / "grid.png")


def test_save_grid_rejects_a_title_too_few(tmp_path):
    with pytest.raises(ValueError, match="1 titles for 2 rows"):
        save_grid([torch.zeros(1, 1, 8, 8)] * 2, tmp_path / "grid.png", titles=["a"])


def test_save_scatter_draws_panels_and_survives_wild_points(tmp_path):
    wild = torch.tensor([[0.0, 0.0], [1e30, 0.0], [float("nan"), 1.0]])
    path = save_scatter(
        {"one": torch.randn(50, 2), "two": wild}, tmp_path / "a" / "b.png", torch.randn(50, 2)
    )
    picture = Image.open(path)
    assert picture.width > 1.5 * picture.height
    save_scatter({"all": torch.full((4, 2), float("nan"))}, tmp_path / "c.png")


def test_save_scatter_rejects_what_is_not_plane(tmp_path):
    with pytest.raises(ValueError, match=r"points \[n 2\], but got \(4, 3\)"):
        save_scatter({"a": torch.zeros(4, 3)}, tmp_path / "x.png")


def test_save_scatter_has_panels_in_several_lines(tmp_path):
    """One line of 183 panels is wider than what matplotlib draws."""
    panels = {str(number): torch.zeros(1, 2) for number in range(25)}
    with Image.open(save_scatter(panels, tmp_path / "many.png")) as picture:
        assert picture.width < 2**13
