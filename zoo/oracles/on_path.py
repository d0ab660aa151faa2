"""The exact solution on any path, from an oracle that is exact on the linear one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from registry.protocols import Cond, Path
from zoo.ops import like
from zoo.oracles.exact import Oracle
from zoo.paths import Linear


class OnPath(nn.Module):
    """The solution on another path of an oracle that is exact on the linear one.

    x_t / (alpha + sigma) lies on the linear path at the time sigma / (alpha + sigma).
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
        v = self.path.to_velocity(y - like(time, y) * v, y + like(1 - time, y) * v, t)
        end = like(end_scale, y) * self.oracle.flow_map(y, time, end_time, cond)
        gap = like(torch.where(t > r, t - r, 1), y)
        u = torch.where(like(t > r, y), (x - end) / gap, v)
        return {"u": u.to(x.dtype), "v": v.to(x.dtype)}

    def _linear(self, t: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.path.alpha(t) + self.path.sigma(t)
        return scale, self.path.sigma(t) / scale


def exact_on(oracle: Oracle, path: Path) -> nn.Module:
    """The network that is exact on this path."""
    return oracle if isinstance(path, Linear) else OnPath(oracle, path)
