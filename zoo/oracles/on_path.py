"""The exact solution on any path, from an oracle that is exact on the linear one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from registry.protocols import Cond, Path
from zoo.ops import like
from zoo.oracles.exact import Oracle
from zoo.paths import Linear


class OnPath(nn.Module):
    """The solution on another path of an oracle that is exact on the linear one.

    x_t / (alpha + sigma) lies on the linear path at the time sigma / (alpha + sigma). What the path
    says of its derivatives is not believed, or an objective on a wrong path would be right here.
    """

    def __init__(self, oracle: Oracle, path: Path):
        super().__init__()
        self.oracle, self.path, self.shape = oracle, path, oracle.shape

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        t, r = t.double(), r.double()
        scale, time = self._linear(t)
        end_scale, end_time = self._linear(r)
        y = x.double() / like(scale, x)
        v = self.oracle.velocity(y, time, cond)
        x0, x1 = y - like(time, y) * v, y + like(1 - time, y) * v
        v = like(slope(self.path.alpha, t), y) * x0 + like(slope(self.path.sigma, t), y) * x1
        end = like(end_scale, y) * self.oracle.flow_map(y, time, end_time, cond)
        gap = like(torch.where(t > r, t - r, 1), y)
        u = torch.where(like(t > r, y), (x - end) / gap, v)
        return {"u": u.to(x.dtype), "v": v.to(x.dtype)}

    def _linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.path.alpha(t) + self.path.sigma(t)
        return scale, self.path.sigma(t) / scale


def exact_on(oracle: Oracle, path: Path) -> nn.Module:
    """The network that is exact on this path."""
    return oracle if type(path) is Linear else OnPath(oracle, path)


def slope(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """df/dt at the times t [b] in [0, 1], in float64, by a polynomial through five values of f.

    It is right to about 1e-11 where f is smooth, asks for no time outside [0, 1], and lets
    forward-mode derivatives through, unlike a derivative inside another one.
    """
    t, step = t.double(), 1e-3
    centre = t.clamp(2 * step, 1 - 2 * step)
    s = (t - centre) / step  # in [-2, 2], and 0 inside
    weights = {  # the derivatives in s of Lagrange's polynomials
        -2: (2 * s**3 - 3 * s**2 - s + 1) / 12,
        -1: (-4 * s**3 + 3 * s**2 + 8 * s - 4) / 6,
        0: (2 * s**3 - 5 * s) / 2,
        1: (-4 * s**3 - 3 * s**2 + 8 * s + 4) / 6,
        2: (2 * s**3 + 3 * s**2 - s - 1) / 12,
    }
    return torch.stack([w * f(centre + k * step) for k, w in weights.items()]).sum(0) / step
