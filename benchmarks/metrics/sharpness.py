"""How sharp pictures are, and other pictures blurred until they are as sharp.

A blurred picture, and a grey blob above all, lies near many pictures: its distance to the nearest
one is small though it copies none. So a distance of samples is compared with that of real pictures
which are as sharp as the samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 20  # of the width of the blur, from the picture's own size on


def sharpness(pictures: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels of each picture: [n c h w] -> [n]."""
    across, down = pictures.diff(dim=-1).square(), pictures.diff(dim=-2).square()
    return across.flatten(1).mean(1) + down.flatten(1).mean(1)


def blurred(pictures: Tensor, width: float) -> Tensor:
    """[n c h w] under a Gaussian of this standard deviation in pixels, cut at the edges."""
    if width == 0:
        return pictures
    height, length = pictures.shape[-2:]
    rows = pictures.transpose(-1, -2) @ _kernel(height, width).to(pictures).T
    return rows.transpose(-1, -2) @ _kernel(length, width).to(pictures).T


def as_sharp_as(pictures: Tensor, samples: Tensor) -> Tensor:
    """The pictures, blurred until their median sharpness is that of the samples.

    Pictures that are less sharp than the samples are left as they are.
    """
    wanted = sharpness(samples).median()
    low, high = 0.0, float(max(pictures.shape[-2:]))
    if sharpness(pictures).median() <= wanted:
        return pictures
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sharpness(blurred(pictures, middle)).median() > wanted:
            low = middle
        else:
            high = middle
    return blurred(pictures, high)


def _kernel(size: int, width: float) -> Tensor:
    at = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-((at[:, None] - at) ** 2) / (2 * width**2))
    return weights / weights.sum(1, keepdim=True)
