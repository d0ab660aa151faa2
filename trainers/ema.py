"""Running averages of the weights, for sampling and evaluation.

    average <- decay_k average + (1 - decay_k) net,   decay_k = min(decay, (1 + k) / (10 + k))

at update k = 0, 1, ... Until the limit is reached, what came before update j has a weight of about
(j / k)^9, so the average forgets its start and looks back over the last tenth of the run. The
same rule serves EMA teachers (zoo/teachers.py). Buffers are copied.
"""

from __future__ import annotations

import copy

from torch import nn

from zoo.teachers import Average, warmed_up


def frozen_copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights take no gradient."""
    return copy.deepcopy(net).requires_grad_(False).eval()


class Ema:
    """An average of a network's weights at one decay; `net` is in eval mode."""

    def __init__(self, net: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay {decay!r} must lie in [0, 1)")
        self.decay = decay
        self.net = frozen_copy(net)
        self._average = Average(self.net, net)

    def update(self, step: int) -> None:
        """After update number `step`, counting from 0."""
        self._average.update(warmed_up(self.decay, step))
