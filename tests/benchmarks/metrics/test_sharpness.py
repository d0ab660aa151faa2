"""Sharpness: known values, blurs that reach it, and blobs that are no copies."""

from __future__ import annotations

import torch

from benchmarks.metrics.sharpness import as_sharp_as, blurred, sharpness


def pictures(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 2, 8, 6, generator=torch.Generator().manual_seed(seed))


def nearest(queries: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    distance = torch.cdist(queries.flatten(1), data.flatten(1))
    return distance.masked_fill(distance < 1e-4, torch.inf).amin(1)


def test_sharpness_of_a_checkerboard_and_of_grey():
    board = (torch.arange(8)[:, None] + torch.arange(6)) % 2 * 2.0 - 1  # neighbours differ by 2
    assert sharpness(torch.stack([board, 0 * board])[:, None]).tolist() == [8.0, 0.0]


def test_blur_keeps_a_grey_picture_and_removes_a_checkerboard():
    grey = torch.full((1, 1, 8, 6), 0.3)
    assert torch.allclose(blurred(grey, 2.0), grey)
    assert torch.equal(blurred(pictures(2, 0), 0), pictures(2, 0))
    assert sharpness(blurred(pictures(2, 0), 8.0)).max() < 0.02


def test_pictures_are_blurred_until_they_are_as_sharp():
    soft = blurred(pictures(32, 1), 0.8)
    made = as_sharp_as(pictures(33, 2), soft)
    wanted = float(sharpness(soft).median())
    assert abs(float(sharpness(made).median()) / wanted - 1) < 1e-3
    assert float(sharpness(pictures(33, 2)).median()) > 3 * wanted  # not so before


def test_pictures_that_are_less_sharp_stay_as_they_are():
    soft = blurred(pictures(4, 1), 0.8)
    assert torch.equal(as_sharp_as(soft, pictures(4, 2)), soft)


def test_grey_blobs_are_nearer_than_data_and_not_nearer_than_data_as_sharp():
    data = pictures(200, 3)
    blobs = blurred(pictures(32, 4), 3.0)
    far = nearest(blobs, data).median()
    assert far < 0.8 * nearest(data[:64], data).median()
    others = nearest(as_sharp_as(data[:64], blobs), data[64:]).median()
    assert abs(far / others - 1) < 0.1
    copies = data[:32] + 0.05 * pictures(32, 5)  # and copies are found, beside data as sharp
    assert nearest(copies, data).median() < 0.1 * nearest(data[:64], data).median()
