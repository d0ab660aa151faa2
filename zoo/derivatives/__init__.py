"""Derivatives of a network along a path: exact ones, approximations, and the one that costs least.

The methods know of no objective; objectives name one of them as a field.
"""

from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import OnePass

__all__ = ["Dual", "FiniteDifference", "Jvp", "OnePass"]
