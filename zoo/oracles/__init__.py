"""Exact networks, to test against: the velocity, flow map and average velocity in closed form.

They keep the network's contract (x [b *d], t [b], r [b], cond) -> {"u", "v"} for the linear path
x_t = (1 - t) x0 + t x1 with noise x1 ~ N(0, I) independent of the data, and let forward-mode
derivatives through, so that objectives and samplers run on them unchanged. Parameters and
arithmetic are float64; the result has x's dtype.

`exact_on` makes of an oracle the solution on another path.

`Perturbed` and `WithBias` are networks beside an oracle: at a fixed distance from it, and with
trainable parameters that lead away from it.
"""

from zoo.oracles.exact import Oracle
from zoo.oracles.gaussian import GaussianOracle
from zoo.oracles.mixture import MixtureOracle
from zoo.oracles.on_path import OnPath, exact_on
from zoo.oracles.probes import Perturbed, WithBias

__all__ = [
    "GaussianOracle",
    "MixtureOracle",
    "OnPath",
    "Oracle",
    "Perturbed",
    "WithBias",
    "exact_on",
]
