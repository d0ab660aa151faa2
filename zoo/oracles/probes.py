"""Networks near an oracle: ones whose residuals must not vanish, and directions to test along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from registry.protocols import Cond


class Perturbed(nn.Module):
    """The network with eps * direction added to one output; `direction` [*d] is 1 by default."""

    direction: Tensor

    def __init__(
        self, network: nn.Module, eps: float, key: str, direction: Tensor | None = None
    ) -> None:
        super().__init__()
        self.network, self.eps, self.key = network, eps, key
        ones = torch.ones((), dtype=torch.float64)
        self.register_buffer("direction", ones if direction is None else direction)

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        out = self.network(x, t, r, cond)
        if self.key not in out:
            raise KeyError(f"no output {self.key!r} to perturb; the network makes {sorted(out)}")
        return {**out, self.key: out[self.key] + (self.eps * self.direction).to(x.dtype)}


class WithBias(nn.Module):
    """An oracle plus `bias` + `matrix` f(x, t, r) on each output; both parameters start at zero.

    The features f = (t, r, t r, tanh x) are smooth and bounded, so at theta = 0 the gradient of a
    loss in theta is its moment with each of them: zero in expectation at a fixed point, whatever
    the network around it. `size` is the number of elements of a sample.
    """

    def __init__(self, oracle: nn.Module, size: int, keys: Sequence[str] = ("u", "v")) -> None:
        super().__init__()
        self.oracle = oracle
        self.bias = nn.ParameterDict({k: _zeros(size) for k in keys})
        self.matrix = nn.ParameterDict({k: _zeros(size, size + 3) for k in keys})

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        out = self.oracle(x, t, r, cond)
        states = x.to(torch.float64).flatten(1).tanh()
        features = torch.cat([torch.stack([t, r, t * r], 1).to(states.dtype), states], 1)
        added = {k: self.bias[k] + features @ self.matrix[k].T for k in self.bias}
        return out | {k: out[k] + y.reshape(x.shape).to(x.dtype) for k, y in added.items()}


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=torch.float64))
