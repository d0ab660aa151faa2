"""Directional derivatives of a network live here: the exact and approximate methods, `one_pass`,
and the dual tensors by which it works.

Nothing here may know of an objective; an objective names one of the methods in a field.
"""

from zoo.derivatives.methods import (
    Dual,
    FiniteDifference,
    Jvp,
    derivative_of_u,
    no_gradient,
    replay_rng,
    with_derivatives,
)
from zoo.derivatives.one_pass import OnePass

__all__ = [
    "Dual",
    "FiniteDifference",
    "Jvp",
    "OnePass",
    "derivative_of_u",
    "no_gradient",
    "replay_rng",
    "with_derivatives",
]
