"""Exact networks: closed forms of velocity, flow map and average velocity, to test against.

They keep the network's contract (x [b *d], t [b], r [b], cond) -> {"u", "v"} for the linear path
x_t = (1 - t) x0 + t x1 with noise x1 ~ N(0, I) independent of the data, and let forward-mode
derivatives through, so that objectives and samplers run on them unchanged. Parameters are float64,
so is the arithmetic; the result has x's dtype.

`Perturbed` and `WithBias` step off the oracle: by a fixed amount, and along trainable directions.
"""

from zoo.oracles.exact import Oracle
from zoo.oracles.gaussian import GaussianOracle
from zoo.oracles.mixture import MixtureOracle
from zoo.oracles.probes import Perturbed, WithBias

__all__ = ["GaussianOracle", "MixtureOracle", "Oracle", "Perturbed", "WithBias"]
