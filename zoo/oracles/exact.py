"""The interface of every oracle: u and v as a network, and the laws to compare losses with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from registry.protocols import Cond
from zoo.ops import like


class Oracle(nn.Module):
    """The exact solution for one data law; `v` is v*(x, t), `u` is u*(x, t, r)."""

    shape: tuple[int, ...]  # of one sample

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        return {"u": self.average_velocity(x, t, r, cond), "v": self.velocity(x, t, cond)}

    def velocity(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """v*(x, t) = E[x1 - x0 | x_t = x]."""
        raise NotImplementedError

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None) -> Tensor:
        """u*(x, t, r), the mean of v* over [r, t] along the trajectory through (x, t)."""
        raise NotImplementedError

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None) -> Tensor:
        """X(x, t, r), the state at time r of the trajectory through (x, t)."""
        gap = t.to(x.dtype) - r.to(x.dtype)
        return x - like(gap, x) * self.average_velocity(x, t, r, cond)

    def velocity_jacobian(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """dv*/dx as [b D D], D being the number of elements of a sample."""
        raise NotImplementedError

    def log_density(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """log p_t(x), [b]."""
        raise NotImplementedError

    def score(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The gradient of log p_t, which equals -(x + (1 - t) v*) / t."""
        raise NotImplementedError

    def posterior_variance(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Var(x1 - x0 | x_t = x) per element: what no velocity regression can remove."""
        raise NotImplementedError

    def marginal_mean(self, t: Tensor, cond: Cond | None = None) -> Tensor:
        """E[x_t] for t [b], [b *d]."""
        raise NotImplementedError

    def marginal_variance(self, t: Tensor, cond: Cond | None = None) -> Tensor:
        """Var(x_t) per element for t [b], [b *d]."""
        raise NotImplementedError

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Cond | None]:
        """n data points, and their labels if the data have any."""
        raise NotImplementedError

    def sample_x0(self, n: int, rng: torch.Generator) -> Tensor:
        return self.sample(n, rng)[0]


def parameter(values: object) -> Tensor:
    """A float64 copy, for buffers."""
    return torch.as_tensor(values, dtype=torch.float64).detach().clone()
