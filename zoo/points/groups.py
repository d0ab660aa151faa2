"""The rows of a group compared with one another, each pair of them."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_DISTANCE = 1e-8  # so that the distance of a row and itself has a slope, which is zero


def in_groups(x: Tensor, group: int) -> Tensor:
    """x [b *d] -> [g n k]: groups of n rows, and the k elements of each row."""
    return x.flatten(1).unflatten(0, (-1, group))


def kernel_distance(y: Tensor, z: Tensor, width: Tensor, *, with_itself: bool) -> Tensor:
    """The squared distance of two laws by a kernel (MMD), row by row: y, z [g n k] -> [g n].

    Row j has the mean over k of k(y_j, y_k) + k(z_j, z_k) - 2 k(y_j, z_k) with the Laplace kernel
    exp(-||a - b|| / width), where `width` is [g 1 1]. Without the pairs k = j of a row with itself
    its mean over draws of the rows is the squared distance, and with them it is more.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = (a[:, :, None] - b[:, None]).square().sum(3)
        return torch.exp(-square.clamp_min(LEAST_DISTANCE**2).sqrt() / width)

    pairs = kernel(y, y) + kernel(z, z) - 2 * kernel(y, z)  # [g n n]
    if with_itself:
        return pairs.mean(2)
    n = y.shape[1]
    return (pairs * ~torch.eye(n, dtype=torch.bool, device=y.device)).sum(2) / (n - 1)
