"""Handwritten digits: grey pictures [1 8 8] in [-1, 1], labels 0 to 9; scikit-learn ships them.

The stored values are whole numbers from 0 to 16, so x = value / 8 - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.data.streams import Pictures, StoredSet
from registry import datasets


@datasets.register("digits")
@dataclass(frozen=True, kw_only=True)
class Digits(StoredSet):
    """The 1797 handwritten 8x8 digits that ship with scikit-learn."""

    name: ClassVar = "digits"
    top: ClassVar = 16

    def load(self) -> Pictures:
        from sklearn.datasets import load_digits  # takes a second to import

        images, labels = load_digits().images, load_digits().target
        return Pictures(
            torch.from_numpy(images).to(torch.uint8)[:, None],
            torch.from_numpy(labels).long(),
            tuple("0123456789"),
        )
