"""The objectives, one file for each method; importing this package registers them."""

from zoo.objectives.alpha_flow import AlphaFlow
from zoo.objectives.consistency import Consistency
from zoo.objectives.decm import DECM
from zoo.objectives.decoupled_mean_flow import DecoupledMeanFlow
from zoo.objectives.drifting import Drifting
from zoo.objectives.dumo import DuMo
from zoo.objectives.facm import FACM
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.improved_mean_flow import ImprovedMeanFlow
from zoo.objectives.mean_flow import MeanFlow
from zoo.objectives.moment_matching import MomentMatching
from zoo.objectives.pixel_mean_flow import PixelMeanFlow
from zoo.objectives.recursive_consistency import RecursiveConsistency
from zoo.objectives.self_distillation import SelfDistillation
from zoo.objectives.shortcut import Shortcut
from zoo.objectives.so_flow import SoFlow
from zoo.objectives.terminal_velocity import TerminalVelocity
from zoo.objectives.trig_consistency import TrigConsistency
from zoo.objectives.twin_flow import TwinFlow

__all__ = [
    "DECM",
    "FACM",
    "AlphaFlow",
    "Consistency",
    "DecoupledMeanFlow",
    "Drifting",
    "DuMo",
    "FlowMatching",
    "ImprovedMeanFlow",
    "MeanFlow",
    "MomentMatching",
    "PixelMeanFlow",
    "RecursiveConsistency",
    "SelfDistillation",
    "Shortcut",
    "SoFlow",
    "TerminalVelocity",
    "TrigConsistency",
    "TwinFlow",
]
