"""The objectives, one file for each method; importing this package registers them."""

from zoo.objectives.decm import DECM
from zoo.objectives.drifting import Drifting
from zoo.objectives.dumo import DuMo
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.improved_mean_flow import ImprovedMeanFlow
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.moment_matching import MomentMatching
from zoo.objectives.recursive_consistency import RecursiveConsistency
from zoo.objectives.shortcut import Shortcut
from zoo.objectives.so_flow import SoFlow

__all__ = [
    "DECM",
    "Drifting",
    "DuMo",
    "FlowMatching",
    "ImprovedMeanFlow",
    "MeanFlow",
    "MomentMatching",
    "RecursiveConsistency",
    "Shortcut",
    "SoFlow",
]
