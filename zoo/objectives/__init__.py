"""The objectives, one file for each method; importing this package registers them."""

from zoo.objectives.decm import DECM
from zoo.objectives.dumo import DuMo
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.shortcut import Shortcut

__all__ = ["DECM", "DuMo", "FlowMatching", "MeanFlow", "Shortcut"]
