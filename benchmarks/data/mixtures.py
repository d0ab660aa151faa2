"""Gaussians and mixtures of them: points float32 [d], without labels, drawn without end.

Their exact velocity, and for one Gaussian the exact flow map, are known in closed form
(zoo/oracles), so that what a network learned can be compared with the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from benchmarks.data.streams import EndlessSet, content_hash
from registry import datasets

Row = tuple[float, ...]


@runtime_checkable
class ClosedForm(Protocol):
    """A data set that is a Gaussian mixture: `means` and `stds` [k d], `weights` [k]."""

    def components(self) -> dict[str, Tensor]: ...


class ComponentSet(EndlessSet):
    """A Gaussian mixture whose coordinates are independent within each mode.

    The networks that know the exact solution are built from `components`.
    """

    def __post_init__(self) -> None:
        self.components()  # raises here, and not in training, if the fields do not fit

    def components(self) -> dict[str, Tensor]:
        """`means` and `stds` [k d] and `weights` [k], whose sum is 1, all float64."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.components()["means"].shape[1:])

    def identity(self) -> str:
        content = content_hash(*self.components().values())
        return f"{self.name}: endless x {self.shape}, sha256 {content}"

    def draw(self, n: int, rng: torch.Generator) -> Tensor:
        law = self.components()
        component = torch.multinomial(law["weights"], n, replacement=True, generator=rng)
        noise = torch.randn(n, *self.shape, generator=rng, dtype=torch.float64)
        return (law["means"][component] + law["stds"][component] * noise).float()


@datasets.register("gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian(ComponentSet):
    """One Gaussian in the plane, drawn without end; velocity and flow map in closed form."""

    name: ClassVar = "gaussian"
    mean: Row = (0.6, -0.8)
    std: Row = (0.6, 0.3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # gin's lists are not hashable
        object.__setattr__(self, "std", tuple(self.std))
        super().__post_init__()

    def components(self) -> dict[str, Tensor]:
        return _components("gaussian", (self.mean,), (self.std,), (1.0,))


@datasets.register("mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture(ComponentSet):
    """Four unequal Gaussian modes in the plane, drawn without end; velocity in closed form.

    The default has mean 0 and standard deviation 1 in both coordinates. Its weights are unequal and
    it has no axis of symmetry, so that a wrong sign or a forgotten weight becomes visible.
    """

    name: ClassVar = "mixture"
    means: tuple[Row, ...] = ((-1.16, -0.52), (0.81, -1.17), (0.45, 1.35), (1.26, 0.69))
    stds: tuple[Row, ...] = ((0.18, 0.38), (0.27, 0.16), (0.13, 0.27), (0.18, 0.22))
    weights: Row = (0.4, 0.2, 0.25, 0.15)  # relative: their sum need not be 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "means", tuple(map(tuple, self.means)))
        object.__setattr__(self, "stds", tuple(map(tuple, self.stds)))
        object.__setattr__(self, "weights", tuple(self.weights))
        super().__post_init__()

    def components(self) -> dict[str, Tensor]:
        return _components("mixture", self.means, self.stds, self.weights)


def _components(
    name: str, means: tuple[Row, ...], stds: tuple[Row, ...], weights: Row
) -> dict[str, Tensor]:
    lengths = {len(row) for row in (*means, *stds)}
    if len(lengths) != 1 or 0 in lengths or not len(means) == len(stds) == len(weights):
        raise ValueError(
            f"{name}: means {means}, stds {stds} and weights {weights} do not fit together; give "
            "each component a mean and a std of the same length, and one weight"
        )
    law = [torch.tensor(values, dtype=torch.float64) for values in (means, stds, weights)]
    if not all(bool(values.isfinite().all()) for values in law):
        raise ValueError(f"{name}: means {means}, stds {stds}, weights {weights} must be finite")
    if bool((law[1] <= 0).any()) or bool((law[2] <= 0).any()):
        raise ValueError(f"{name}: stds {stds} and weights {weights} must be positive")
    return {"means": law[0], "stds": law[1], "weights": law[2] / law[2].sum()}
