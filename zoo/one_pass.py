"""The address that `zoo.derivatives.one_pass` had in version 0.1, for parts of one's own."""

from zoo.derivatives.one_pass import DerivativeOfU as Moved
from zoo.derivatives.one_pass import (
    OnePass,
    apart,
    outputs_and_derivative,
    outputs_then_derivative,
)

__all__ = ["Moved", "OnePass", "apart", "outputs_and_derivative", "outputs_then_derivative"]
