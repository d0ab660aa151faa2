"""From a squared error to a loss: error [b] -> loss [b].

A weight multiplies the gradient of a row's error by a positive number, so that `unweighted`,
`adaptive`, `pseudo_huber`, `learned_logvar` and `cauchy` have the same gradient direction per row.
With conditional velocities in the target, a weight that depends on the error moves the optimum away
from the conditional mean; `unweighted` does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from registry import weights
from registry.protocols import Reference, Weight
from registry.ranges import Positive
from zoo.times import MEAN_FLOW

DECOUPLED_MEAN_FLOW = Reference(
    title="Decoupled MeanFlow: Turning Flow Models into Flow Maps for Accelerated Sampling",
    authors="Lee et al.",
    year=2025,
    arxiv="2510.24474",
)


@weights.register("unweighted")
@dataclass(frozen=True, kw_only=True)
class Unweighted:
    """The squared error itself."""

    heads: ClassVar[tuple[str, ...]] = ()

    def __call__(self, error: Tensor, out: Mapping[str, Tensor]) -> Tensor:
        return error


@weights.register("adaptive")
@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """error / sg(error + offset)^power: MeanFlow's adaptive weight."""

    heads: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar = MEAN_FLOW

    power: float = 1.0
    offset: float = 0.01

    def __post_init__(self) -> None:
        if not self.offset > 0:
            raise ValueError(f"adaptive.offset = {self.offset!r} must be positive")

    def __call__(self, error: Tensor, out: Mapping[str, Tensor]) -> Tensor:
        return error / (error.detach() + self.offset) ** self.power


@weights.register("pseudo_huber")
@dataclass(frozen=True, kw_only=True)
class PseudoHuber:
    """sqrt(error + c^2) - c: quadratic for small errors, linear for large ones."""

    heads: ClassVar[tuple[str, ...]] = ()
    reference: ClassVar = Reference(
        title="Improved Techniques for Training Consistency Models",
        authors="Song and Dhariwal",
        year=2023,
        arxiv="2310.14189",
    )

    c: float = 0.03

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"pseudo_huber.c = {self.c!r} must be positive")

    def __call__(self, error: Tensor, out: Mapping[str, Tensor]) -> Tensor:
        return (error + self.c**2).sqrt() - self.c


@weights.register("learned_logvar")
@dataclass(frozen=True, kw_only=True)
class LearnedLogvar:
    """exp(-logvar) error + logvar, with the network's own log-variance head.

    Another weight may stand in the place of the error: exp(-logvar) weight(error) + logvar (ESC).
    """

    heads: ClassVar[tuple[str, ...]] = ("logvar",)
    reference: ClassVar = Reference(
        title="Analyzing and Improving the Training Dynamics of Diffusion Models",
        authors="Karras et al.",
        year=2023,
        arxiv="2312.02696",
    )

    weight: Weight | None = None

    def __call__(self, error: Tensor, out: Mapping[str, Tensor]) -> Tensor:
        weighted = error if self.weight is None else self.weight(error, out)
        return (-out["logvar"]).exp() * weighted + out["logvar"]


@weights.register("cauchy")
@dataclass(frozen=True, kw_only=True)
class Cauchy:
    """log(exp(-logvar) error + offset) + share logvar, with the network's log-variance head.

    In the paper, as readers quote it, offset = 1 and share = 1/2, for which exp(logvar) tends to
    the error. The defaults are those of the released code. There it is log(error + offset
    exp(logvar)), which falls with logvar without end, slowly, towards the logarithm of the error.
    """

    heads: ClassVar[tuple[str, ...]] = ("logvar",)
    reference: ClassVar = DECOUPLED_MEAN_FLOW

    offset: Positive = 0.01
    share: Positive = 1.0

    def __post_init__(self) -> None:
        for name in ("offset", "share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"cauchy.{name} = {getattr(self, name)!r} must be positive")

    def __call__(self, error: Tensor, out: Mapping[str, Tensor]) -> Tensor:
        logvar = out["logvar"]
        return ((-logvar).exp() * error + self.offset).log() + self.share * logvar
