"""EDM's augmentation of training pictures, without vertical flips and rotation, as in MeanFlow.

A picture [c h w] is changed in these ways, the first with probability 1/2, each of the others with
`probability`; every w is a draw from N(0, 1):

    mirrored left to right
    scaled by 2^(0.2 w)
    stretched by 2^(0.2 w) along a direction, which is horizontal in half of the cases
    moved by 0.125 w_x of the side in x and by 0.125 w_y in y

The network is told what was done by cond["augment"] [b 6]: whether the picture is mirrored (0 or
1), w of the scale, w cos(angle) and w sin(angle) of the stretch, w_x, w_y. All zeros mean an
unchanged picture. Samplers give no cond["augment"], since samples are to look like unchanged
pictures.

Karras et al., arXiv 2206.00364, appendix F.2. Our reading: bilinear interpolation with reflected
borders, in place of wavelet filters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data.streams import DRAWN_AT_ONCE, cut, seeded
from registry import datasets
from registry.protocols import Cond, Dataset, Share, groups_by_label, read_share, scaled_by


@datasets.register("edm_augment")
@dataclass(frozen=True, kw_only=True)
class EdmAugment:
    """The pictures of another data set, augmented in training batches and not in the reference."""

    data: Dataset
    probability: float = 0.12
    labelled: bool = True  # False leaves out the labels of the other data set

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"edm_augment.probability = {self.probability!r} must lie in [0, 1]")
        if len(self.shape) != 3:
            raise ValueError(f"edm_augment takes pictures; {self.name} has shape {self.shape}")

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def num_classes(self) -> int:
        return self.data.num_classes if self.labelled else 0

    @property
    def size(self) -> int:
        return self.data.size

    def identity(self) -> str:
        return self.data.identity()

    @property
    def groups_by_label(self) -> bool:
        return groups_by_label(self.data)

    @property
    def scaled_by(self) -> float:
        return scaled_by(self.data)

    def batch(
        self, step: int, n: int, seed: int, same_label: int = 1
    ) -> tuple[Tensor, Cond | None]:
        return self.batch_share(step, n, seed, Share(group=same_label))

    def batch_share(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        if self.labelled or share.group == 1:
            x0, cond = read_share(self.data, step, n, seed, share)
        else:  # groups of any label, which the other data set would give one
            whole, cond = read_share(self.data, step, n, seed, Share())
            (x0,) = share.rows(whole)
        draws = cut(DRAWN_AT_ONCE, step * n, n, lambda block: _draws(self.probability, seed, block))
        cond = {**(self._kept(cond) or {}), "augment": labels(draws)}
        return augmented(x0, *share.rows(draws)), cond

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        x0, cond = self.data.reference(n, seed)
        return x0, self._kept(cond)

    def sample_labels(self, n: int) -> Cond | None:
        return self._kept(self.data.sample_labels(n))

    def _kept(self, cond: Cond | None) -> Cond | None:
        return cond if self.labelled else None


def augmented(x: Tensor, draws: Tensor) -> Tensor:
    """Change pictures [b c h w] by draws [b 6].

    A draw is: mirrored (0 or 1), w of the scale, w of the stretch, angle of the stretch, w_x, w_y.
    """
    mirrored, scale, stretch, angle, *shift = draws.double().unbind(1)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)

    def matrix(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.stack([torch.stack(row, dim=1) for row in (*rows, (zero, zero, one))], dim=1)

    def turn(by: Tensor) -> Tensor:
        return matrix((by.cos(), -by.sin(), zero), (by.sin(), by.cos(), zero))

    # The matrix leads from the place of a pixel to the place where its value comes from. In the
    # units of the grid a side is 2 long, so 0.125 of a side is 0.25.
    small, thin = 2 ** (-0.2 * scale), 2 ** (-0.2 * stretch)
    back = matrix(((1 - 2 * mirrored) * small, zero, zero), (zero, small, zero))
    back = back @ turn(-angle) @ matrix((thin, zero, zero), (zero, 1 / thin, zero)) @ turn(angle)
    back = back @ matrix((one, zero, -0.25 * shift[0]), (zero, one, -0.25 * shift[1]))
    grid = F.affine_grid(back[:, :2].to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def labels(draws: Tensor) -> Tensor:
    """What the network is told about these draws [b 6], in cond["augment"] [b 6]."""
    mirrored, scale, stretch, angle, *shift = draws.unbind(1)
    columns = [mirrored, scale, stretch * angle.cos(), stretch * angle.sin(), *shift]
    return torch.stack(columns, dim=1)


@lru_cache(maxsize=4)
def _draws(probability: float, seed: int, block: int) -> Tensor:
    rng, n = seeded("augment", seed, block), DRAWN_AT_ONCE
    mirrored = torch.rand(n, generator=rng) < 0.5
    scale, stretch, move = (torch.rand(3, n, generator=rng) < probability).float()
    turned = torch.rand(n, generator=rng) < 0.5
    angle = math.pi * (2 * torch.rand(n, generator=rng) - 1) * turned
    w = torch.randn(4, n, generator=rng)
    rows = [mirrored.float(), scale * w[0], stretch * w[1], angle, move * w[2], move * w[3]]
    return torch.stack(rows, dim=1)
