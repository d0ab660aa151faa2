"""Tensors with a tangent beside their value, for derivatives within an ordinary forward."""

from zoo.derivatives.dual_tensors.table import rule_of
from zoo.derivatives.dual_tensors.tensor import Flowing, Lifted, Record, Tape, settled

__all__ = ["Flowing", "Lifted", "Record", "Tape", "rule_of", "settled"]
