"""fp16's dynamic loss scale, with the constants of torch's GradScaler.

fp16 has no number between 0 and 6e-8, so small gradients would vanish. Therefore the loss is
multiplied by a large scale before the backward pass, and each weight divides the gradient that it
receives.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SCALE, SCALE_EVERY = 2.0**16, 2000


class LossScale:
    """The scale of the loss; it is halved after an overflow and doubled after many good steps."""

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self.good = 0  # steps since it was halved

    def undo(self, gradient: Tensor) -> Tensor:
        """A gradient of the loss itself; the hook of every weight."""
        return gradient / self.value

    def follow(self, norm: Tensor) -> Tensor:
        """Adapt the scale to the gradient's norm; returns the norm to report.

        An overflow costs one step, which makes no update, and is no fault: the norm is then 0.
        """
        if bool(norm.isfinite()):
            self.good += 1
            if self.good % SCALE_EVERY == 0:
                self.value *= 2
        elif self.value > 1:
            self.value, self.good = self.value / 2, 0
            return torch.zeros_like(norm)
        return norm
