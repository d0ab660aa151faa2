"""Samplers: from noise to data by a trained network, with and without guidance.

Importing this package registers them. They know networks, paths and guidance, and no objective.
"""

from zoo.samplers.guided import ClassifierFree, InputGuidance, guided_network
from zoo.samplers.methods import (
    Euler,
    FlowMap,
    Heun,
    Mix,
    OneStep,
    Restart,
    euler_step,
    even_times,
    jump,
    shifted,
)
from zoo.samplers.validity import (
    check_sampler,
    default_sampler,
    on_path_of,
    valid_samplers,
)

__all__ = [
    "ClassifierFree",
    "Euler",
    "FlowMap",
    "Heun",
    "InputGuidance",
    "Mix",
    "OneStep",
    "Restart",
    "check_sampler",
    "default_sampler",
    "euler_step",
    "even_times",
    "guided_network",
    "jump",
    "on_path_of",
    "shifted",
    "valid_samplers",
]
