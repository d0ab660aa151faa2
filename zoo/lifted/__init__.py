"""Tensors with a tangent beside their value, for derivatives within an ordinary forward."""

from zoo.lifted.table import rule_of
from zoo.lifted.tensor import Flowing, Lifted, Record, Tape, settled

__all__ = ["Flowing", "Lifted", "Record", "Tape", "rule_of", "settled"]
