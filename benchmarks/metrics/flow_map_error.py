"""Errors against the exact flow, for data whose law is known: what no set of samples can show.

    map_error_t_r      rms(X(x_t, t, r) - X*(x_t, t, r)) / s,    X = x_t - (t - r) u(x_t, t, r)
    velocity_error     rms(v(x_t, t) - v*(x_t, t)) / rms(v*),    t evenly spread over (0, 1)

X* and v* are the mixture's own (zoo/oracles), s is the data's standard deviation and x_t lies on
the linear path, so these are errors of the trained network and not of a sampler. A network that
gives "v" alone has no map; one that gives "u" alone has the velocity u(x, t, t).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from benchmarks.metrics.evaluate import evaluation_mode, noise
from registry.protocols import Dataset, Network
from zoo.guidance import velocity_at
from zoo.oracles import MixtureOracle
from zoo.paths import Linear

INTERVALS = ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0))


@runtime_checkable
class ClosedForm(Protocol):
    """A data set that is a Gaussian mixture: `means` and `stds` [k d], `weights` [k]."""

    def components(self) -> dict[str, Tensor]: ...


def map_error(
    net: Network,
    dataset: Dataset,
    num: int = 1000,
    seed: int = 0,
    intervals: Sequence[tuple[float, float]] = INTERVALS,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, float]]:
    """(name, value) pairs; ValueError for a data set without a closed form."""
    if not isinstance(dataset, ClosedForm):
        raise ValueError(
            f"data set {dataset.name!r} has no closed form, so there is no exact flow to compare "
            "with; use 'gaussian' or 'mixture', or a metric of samples"
        )
    law = dataset.components()
    exact = MixtureOracle(law["means"], law["stds"], law["weights"]).to(device)
    x0 = dataset.reference(num, seed)[0].to(device)
    x1 = noise(dataset.shape, num, seed).to(device)
    path = Linear()
    scale = float(exact.marginal_variance(torch.zeros(1, device=device)).mean().sqrt())
    with evaluation_mode(net), torch.no_grad():
        for t, r in intervals:
            start, end = (torch.full((num,), time, device=device) for time in (t, r))
            x = path.sample(x0, x1, start).x_t
            out = net(x, start, end, None)
            if "u" in out:
                error = (t - r) * (out["u"] - exact.average_velocity(x, start, end))
                yield f"map_error_{t:g}_{r:g}", _rms(error) / scale
        t_all = (torch.arange(num, device=device) + 0.5) / num
        x = path.sample(x0, x1, t_all).x_t
        wanted = exact.velocity(x, t_all)
        yield "velocity_error", _rms(velocity_at(net, x, t_all, None) - wanted) / _rms(wanted)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
