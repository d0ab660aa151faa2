"""Errors against the exact flow, for data whose law is known: what no set of samples can show.

    map_error_t_r      rms(X(x_t, t, r) - X*(x_t, t, r)) / s,    X = x_t - (t - r) u(x_t, t, r)
    velocity_error     rms(v(x_t, t) - v*(x_t, t)) / rms(v*),    t evenly spread over (0, 1)

X* and v* are the exact ones on the objective's own path, on which x_t lies too (zoo/oracles), and s
is the data's standard deviation, so these are errors of the trained network and not of a sampler.

What an objective trains decides which of them there are (registry/sampling.py): a consistency model
has the errors of maps to r = 0 and no velocity, a velocity model the velocity alone, DE-CM those of
its clusters. A method that trains a law alone has none: its samples may be right by another map
than the exact one. Where no objective is given, the outputs of the network decide, on the linear
path: with "v" alone there is no map, and with "u" alone the velocity is u(x, t, t).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.data.mixtures import ClosedForm as ClosedForm
from benchmarks.metrics.evaluate import evaluation_mode, noise
from registry.protocols import Dataset, Network, Objective
from registry.sampling import has_velocity, map_is_exact_at
from zoo.guidance import velocity_at
from zoo.oracles import MixtureOracle, exact_on
from zoo.paths import path_of

INTERVALS = ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0))


def map_error(
    net: Network,
    dataset: Dataset,
    num: int = 1000,
    seed: int = 0,
    intervals: Sequence[tuple[float, float]] = INTERVALS,
    device: torch.device | str = "cpu",
    objective: Objective | None = None,
) -> Iterator[tuple[str, float]]:
    """(name, value) pairs; ValueError for a data set without a closed form."""
    if not isinstance(dataset, ClosedForm):
        raise ValueError(
            f"data set {dataset.name!r} has no closed form, so there is no exact flow to compare "
            "with; use 'gaussian' or 'mixture', or a metric of samples"
        )
    law = dataset.components()
    oracle = MixtureOracle(law["means"], law["stds"], law["weights"]).to(device)
    path = path_of(objective)
    exact = exact_on(oracle, path)
    x0 = dataset.reference(num, seed)[0].to(device)
    x1 = noise(dataset.shape, num, seed).to(device)
    scale = float(oracle.marginal_variance(torch.zeros(1, device=device)).mean().sqrt())
    with evaluation_mode(net), torch.no_grad():
        for t, r in intervals:
            if objective is not None and not map_is_exact_at(objective, t, r):
                continue
            start, end = (torch.full((num,), time, device=device) for time in (t, r))
            x = path.sample(x0, x1, start).x_t
            out = net(x, start, end, None)
            if "u" in out:
                error = (t - r) * (out["u"] - exact(x, start, end)["u"])
                yield f"map_error_{t:g}_{r:g}", _rms(error) / scale
        if objective is None or has_velocity(objective):
            t_all = (torch.arange(num, device=device) + 0.5) / num
            x = path.sample(x0, x1, t_all).x_t
            wanted = exact(x, t_all, t_all)["v"]
            yield "velocity_error", _rms(velocity_at(net, x, t_all, None) - wanted) / _rms(wanted)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
