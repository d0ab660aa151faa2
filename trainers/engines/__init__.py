"""The engines that the loop drives, and what they run.

    train_step      network, objective, teachers and averages as one module whose call is the loss
    trained_form    an objective with the derivatives that an engine can take
    torch_engine    one device; several are in trainers/zero/

People import from here; modules of trainers import each other directly.
"""

from __future__ import annotations

from trainers.engines.torch_engine import TorchEngine
from trainers.engines.train_step import TrainStep, compile_in_place, feature_sha256
from trainers.engines.trained_form import as_trained

__all__ = ["TorchEngine", "TrainStep", "as_trained", "compile_in_place", "feature_sha256"]
