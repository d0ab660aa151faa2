"""Dual tensors: tensors that carry a tangent beside their value through an ordinary forward pass.

`DualTensor` and the two records that serve it live here, with one rule for each function that a
network may call. Objectives, networks and the registry are unknown here.
"""

from zoo.derivatives.dual_tensors.table import rule_of
from zoo.derivatives.dual_tensors.tensor import (
    DualTensor,
    EagerRecord,
    LinearizedRecord,
    TangentRecord,
    primal_of,
)

__all__ = [
    "DualTensor",
    "EagerRecord",
    "LinearizedRecord",
    "TangentRecord",
    "primal_of",
    "rule_of",
]
