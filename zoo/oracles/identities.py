"""Identities that hold at the exact flow map and only there, as residuals [b *d] of a network.

    u(x, t, r) average velocity,   X(x, t, r) = x - (t - r) u(x, t, r),   v(x, t) velocity
    D(f; a, b, c) = df/dx a + b df/dt + c df/dr

Each function returns left side minus right side. All vanish at the networks of zoo/oracles, but
`alpha_flow_limit` and `dumo_fd` only up to O(alpha) and O(delta). v is the network's "v", or
u(x, t, t) if it has none. `given(net, cond)` binds a condition first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from registry.protocols import Cond, Derivative, Network
from zoo.derivatives.methods import Dual
from zoo.derivatives.one_pass import outputs_then_derivative
from zoo.guidance import velocity_at
from zoo.ops import like
from zoo.residuals import Rcgm

_DUAL = Dual()


def given(net: Network, cond: Cond) -> Network:
    """The network at a fixed condition, whatever condition it is then called with."""

    def network(x: Tensor, t: Tensor, r: Tensor, _: Cond | None = None) -> dict[str, Tensor]:
        return net(x, t, r, cond)

    return network


def mean_flow(
    net: Network, x: Tensor, t: Tensor, r: Tensor, derivative: Derivative = _DUAL
) -> Tensor:
    """u = v - (t - r) D(u; v, 1, 0). Geng et al., arXiv 2505.13447."""
    v = velocity_at(net, x, t, None)
    du_dt = derivative(_average(net), (x, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    return _average(net)(x, t, r) - (v - like(t - r, x) * du_dt)


def improved_mean_flow(
    net: Network, x: Tensor, t: Tensor, r: Tensor, derivative: Derivative = _DUAL
) -> Tensor:
    """u + (t - r) D(u; u(x, t, t), 1, 0) = v. Improved MeanFlow, its variant without a v head."""
    u = _average(net)
    du_dt = derivative(u, (x, t, r), (u(x, t, t), torch.ones_like(t), torch.zeros_like(r)))
    return u(x, t, r) + like(t - r, x) * du_dt - velocity_at(net, x, t, None)


def eulerian(
    net: Network, x: Tensor, t: Tensor, r: Tensor, derivative: Derivative = _DUAL
) -> Tensor:
    """D(X; v, 1, 0) = 0. Flow-map matching; with r = 0, a continuous-time consistency model."""
    tangents = (velocity_at(net, x, t, None), torch.ones_like(t), torch.zeros_like(r))
    return derivative(_flow_map(net), (x, t, r), tangents)


def lagrangian(
    net: Network, x: Tensor, t: Tensor, r: Tensor, derivative: Derivative = _DUAL
) -> Tensor:
    """D(X; 0, 0, 1) = v(X, r). Flow-map matching; terminal velocity matching."""
    flow_map = _flow_map(net)
    tangents = (torch.zeros_like(x), torch.zeros_like(t), torch.ones_like(r))
    return derivative(flow_map, (x, t, r), tangents) - velocity_at(net, flow_map(x, t, r), r, None)


def semigroup(net: Network, x: Tensor, t: Tensor, r: Tensor, fraction: float = 0.5) -> Tensor:
    """X(X(x, t, m), m, r) = X(x, t, r), m = t - fraction (t - r). Progressive distillation, CTM."""
    flow_map, m = _flow_map(net), t - fraction * (t - r)
    return flow_map(flow_map(x, t, m), m, r) - flow_map(x, t, r)


def shortcut(net: Network, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u = (u(x, t, m) + u(X(x, t, m), m, r)) / 2, m = (t + r) / 2. Shortcut, arXiv 2410.12557."""
    u, m = _average(net), (t + r) / 2
    return u(x, t, r) - (u(x, t, m) + u(_flow_map(net)(x, t, m), m, r)) / 2


def alpha_flow(net: Network, x: Tensor, t: Tensor, r: Tensor, alpha: float = 0.5) -> Tensor:
    """u = a w + (1 - a) u(x - (t - s) w, s, r), s = t - a (t - r), w = u(x, t, s). alpha-Flow."""
    s = t - alpha * (t - r)
    return _after_shift(net, x, t, s, r, alpha, _average(net)(x, t, s))


def alpha_flow_limit(net: Network, x: Tensor, t: Tensor, r: Tensor, alpha: float) -> Tensor:
    """`alpha_flow` with w = v, divided by alpha: tends to `mean_flow` as alpha -> 0. alpha-Flow."""
    s = t - alpha * (t - r)
    return _after_shift(net, x, t, s, r, alpha, velocity_at(net, x, t, None)) / alpha


def dumo_fd(net: Network, x: Tensor, t: Tensor, r: Tensor, delta: float, order: int) -> Tensor:
    """((t - r) u - D) / (t - m) = v (zoo/residuals.py): `mean_flow` as delta -> 0. RCGM, DuMo."""
    residual = Rcgm(delta=delta, order=order)
    out, du_along = outputs_then_derivative(residual.derivative, net, None, (x, t, r))
    return residual(du_along, net, x, t, r, None, out["u"], velocity_at(net, x, t, None))


def n2n(
    net: Network,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    lam: float,
    gam: float,
    derivative: Derivative = _DUAL,
) -> Tensor:
    """(lam + gam) u + (t - r) D(u; gam v, gam, -lam) = lam v(X, r) + gam v. arXiv 2602.10764."""
    u, v = _average(net), velocity_at(net, x, t, None)
    v_end = velocity_at(net, _flow_map(net)(x, t, r), r, None)
    tangents = (gam * v, gam * torch.ones_like(t), -lam * torch.ones_like(r))
    du = derivative(u, (x, t, r), tangents)
    return (lam + gam) * u(x, t, r) + like(t - r, x) * du - (lam * v_end + gam * v)


def _average(net: Network) -> Callable[..., Tensor]:
    return lambda x, t, r: net(x, t, r, None)["u"]


def _flow_map(net: Network) -> Callable[..., Tensor]:
    return lambda x, t, r: x - like(t - r, x) * net(x, t, r, None)["u"]


def _after_shift(
    net: Network, x: Tensor, t: Tensor, s: Tensor, r: Tensor, alpha: float, w: Tensor
) -> Tensor:
    """u(x, t, r) - alpha w - (1 - alpha) u(x_s, s, r), x_s = x - (t - s) w."""
    u = _average(net)
    return u(x, t, r) - alpha * w - (1 - alpha) * u(x - like(t - s, x) * w, s, r)
