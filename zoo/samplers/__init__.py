"""Samplers: from noise to data by a trained network, with and without guidance.

Importing this package registers them. They know networks, paths and guidance, and no objective.
"""

from zoo.samplers.guided import ClassifierFree, InputGuidance, guided_network
from zoo.samplers.methods import (
    Euler,
    FlowMap,
    Heun,
    Mix,
    Restart,
    euler_step,
    even_times,
    jump,
    shifted,
)
from zoo.samplers.validity import check_sampler, valid_samplers

__all__ = [
    "ClassifierFree",
    "Euler",
    "FlowMap",
    "Heun",
    "InputGuidance",
    "Mix",
    "Restart",
    "check_sampler",
    "euler_step",
    "even_times",
    "guided_network",
    "jump",
    "shifted",
    "valid_samplers",
]
