"""What the tests of the derivative backends share: points, directions, errors, kernels called."""

from __future__ import annotations

import pytest
import torch
from backbone_cases import inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.derivatives.one_pass import OnePass

each_way = pytest.mark.parametrize("way", ["with_value", "linearized"])

ROUNDING = 1e-5  # relative errors in float32; measured: 3e-6


def both(way, fn, primals, tangents, key="u"):
    """Outputs and the derivative of one of them, by either way of asking `one_pass`."""
    if way == "with_value":
        return OnePass().with_value(fn, primals, tangents, key)
    out, du_along = OnePass().linearized(fn, primals, key)
    return out, du_along(tangents)


def output(net, cond=None, key="u"):
    return lambda x, t, r: net(x, t, r, cond)[key]


def directions(x: Tensor, t: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    return {"mean_flow": (v, one, zero), "n2n": (1.5 * v, 1.5 * one, -0.5 * one)}


def along(backbone, n=5, which="mean_flow"):
    """The primals, tangents and condition of a backbone's test inputs."""
    x, t, r, cond = inputs(backbone, n)
    return (x, t, r), directions(x, t)[which], cond


def error(found: Tensor, expected: Tensor) -> float:
    """The distance of two derivatives, relative to the norm of the second."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Kernels(TorchDispatchMode):
    """Notes the kernels that are called, in their order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def calls(self, kernel: str) -> int:
        return sum(kernel in name for name in self.names)
