"""Optimisation: the loop, its engines, optimizers, EMA, checkpoints and callbacks."""

from __future__ import annotations

from trainers.budget import Budget
from trainers.callbacks import (
    Callback,
    CheckpointCallback,
    MetricsLog,
    NonFiniteLoss,
    PeriodicEvaluation,
    ProgressBar,
    StopOnNonFinite,
)
from trainers.engines import TorchEngine, TrainStep
from trainers.loop import Training, fit
from trainers.optim import AdamW, ConstantLr, Cosine, RAdam
from trainers.state import TrainState

__all__ = [
    "AdamW",
    "Budget",
    "Callback",
    "CheckpointCallback",
    "ConstantLr",
    "Cosine",
    "MetricsLog",
    "NonFiniteLoss",
    "PeriodicEvaluation",
    "ProgressBar",
    "RAdam",
    "StopOnNonFinite",
    "TorchEngine",
    "TrainState",
    "TrainStep",
    "Training",
    "fit",
]
