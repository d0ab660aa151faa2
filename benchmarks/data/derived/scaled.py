"""The data set `scaled`: another one times a factor, which scales the noise by 1 / factor.

    x_t = alpha(t) f x0 + sigma(t) x1 = f (alpha(t) x0 + sigma(t) x1 / f)

So training on f x0 with noise of unit variance is training on x0 with noise of standard deviation
1 / f, in coordinates that are f times as large: a noise scale of 2 is factor = 0.5. The standard
deviation of the data, which EDM-like methods call sigma_data, is f times as large, too.

The network sees the scaled rows. People and metrics see the original ones: samples are divided by
the factor again, so that values are those of the other data set, and runs of different factors are
compared with the same reference. Powers of two scale without rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.data.mixtures import ClosedForm
from registry import datasets
from registry.protocols import (
    Coded,
    Cond,
    Dataset,
    Share,
    groups_by_label,
    read_share,
    scaled_by,
)


@datasets.register("scaled")
@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Another data set times a factor; the same as noise of the scale 1 / factor."""

    dataset: Dataset
    factor: float

    def __post_init__(self) -> None:
        number = isinstance(self.factor, int | float) and not isinstance(self.factor, bool)
        if not (number and 0 < self.factor < math.inf):
            raise ValueError(
                f"scaled.factor = {self.factor!r} must be a positive number; for a noise scale of "
                "2 it is 0.5"
            )
        # What the other data set can do beside the contract, this one can do, too.
        if isinstance(self.dataset, Coded):
            self._can("decode", self._decode)
        if (codes := getattr(self.dataset, "codes", None)) is not None:
            self._can("codes", replace(codes, scale=[s * self.factor for s in codes.scale]))
        if isinstance(self.dataset, ClosedForm):
            self._can("components", self._components)

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dataset.shape

    @property
    def num_classes(self) -> int:
        return self.dataset.num_classes

    @property
    def size(self) -> int:
        return self.dataset.size

    @property
    def groups_by_label(self) -> bool:
        return groups_by_label(self.dataset)

    @property
    def scaled_by(self) -> float:
        return self.factor * scaled_by(self.dataset)

    def identity(self) -> str:
        """That of the other data set, whose rows are what samples are compared with."""
        return self.dataset.identity()

    def batch(
        self, step: int, n: int, seed: int, same_label: int = 1
    ) -> tuple[Tensor, Cond | None]:
        return self.batch_share(step, n, seed, Share(group=same_label))

    def batch_share(self, step: int, n: int, seed: int, share: Share) -> tuple[Tensor, Cond | None]:
        x0, cond = read_share(self.dataset, step, n, seed, share)
        return x0 * self.factor, cond

    def reference(self, n: int, seed: int) -> tuple[Tensor, Cond | None]:
        x0, cond = self.dataset.reference(n, seed)
        return x0 * self.factor, cond

    def sample_labels(self, n: int) -> Cond | None:
        return self.dataset.sample_labels(n)

    def _decode(self, codes: Tensor) -> Tensor:
        assert isinstance(self.dataset, Coded)
        return self.dataset.decode(codes / self.factor)

    def _components(self) -> dict[str, Tensor]:
        assert isinstance(self.dataset, ClosedForm)
        law = self.dataset.components()
        return {**law, "means": law["means"] * self.factor, "stds": law["stds"] * self.factor}

    def _can(self, name: str, what: Any) -> None:
        object.__setattr__(self, name, what)
