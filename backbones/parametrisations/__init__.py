"""What readouts mean: equations from a raw readout to a velocity, and a check of their smoothness.

`vp_noise`, the noise of DiT's process, is in backbones/noise.py.
"""

from backbones.parametrisations.equations import (
    EDM,
    Data,
    RawVelocity,
    ScaledByGuidance,
    Trig,
    per_row,
)
from backbones.parametrisations.smoothness import check_smooth

__all__ = ["EDM", "Data", "RawVelocity", "ScaledByGuidance", "Trig", "check_smooth", "per_row"]
