"""Objectives whose quotas, couplings, guidance and derivatives share out a batch in many ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.couplings import MinibatchOT
from zoo.features import RawValues
from zoo.guidance import UniformGuidance
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
from zoo.points.velocities import Own, PlugIn
from zoo.residuals import Exact
from zoo.times import LogitNormalPair, Progressive, Stratified

OBJECTIVES: Mapping[str, Any] = {
    "flow_matching": FlowMatching(times=Stratified()),
    "optimal_transport": FlowMatching(coupling=MinibatchOT()),
    "mean_flow": MeanFlow(omega=0.5, kappa=0.3),
    "mean_flow_own": MeanFlow(velocity=Own(), omega=0.5, kappa=0.3, times=Progressive(steps=3)),
    "plug_in": FlowMatching(velocity=PlugIn(fraction=0.5)),
    "mean_flow_plug_in": MeanFlow(velocity=PlugIn(fraction=0.5), omega=0.5, label_dropout=0.4),
    "one_row_of_quota": MeanFlow(times=LogitNormalPair(off_diagonal_fraction=0.05)),
    "improved_mean_flow": ImprovedMeanFlow(),
    "pixel_mean_flow": PixelMeanFlow(features=RawValues()),
    "decoupled_mean_flow": DecoupledMeanFlow(omega=0.4),
    "explicit_shortcut": MeanFlow(velocity=PlugIn(group=2), times=Progressive(steps=3)),
    "recursive_consistency": RecursiveConsistency(omega=0.4),
    "so_flow": SoFlow(guidance_scale=2.0),
    "consistency": Consistency(label_dropout=0.3),
    "consistency_karras": Consistency(steps="karras", velocity=PlugIn(fraction=0.5)),
    "trig_consistency": TrigConsistency(label_dropout=0.3),
    "self_distillation": SelfDistillation(),
    "self_distillation_esd": SelfDistillation(kind="esd", gradient="full"),
    "self_distillation_psd": SelfDistillation(kind="psd"),
    "alpha_flow": AlphaFlow(kappa=0.3, first_share=0.3),
    "alpha_flow_own": AlphaFlow(velocity=Own(), first_share=0.5, own_first_step=True),
    "alpha_flow_derivative": AlphaFlow(first_share=0.0),
    "twin_flow": TwinFlow(omega=0.4),
    "moment_matching": MomentMatching(group=2, label_dropout=0.4, halvings=8),
    "drifting": Drifting(group=4),
    "shortcut": Shortcut(bootstrap_fraction=0.3, guidance_scale=1.5),
    "terminal_velocity": TerminalVelocity(guidance=UniformGuidance(), label_dropout=0.4),
    "dumo": DuMo(omega=0.4),
    "dumo_exact": DuMo(residual=Exact()),
    "decm": DECM(guidance_scale=1.5),
    "facm": FACM(guidance_scale=1.5),
    "decm_plug_in": DECM(velocity=PlugIn(fraction=0.5), guidance_scale=1.5),
}
