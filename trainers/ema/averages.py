"""Running averages of the weights, for sampling and evaluation.

    average <- decay_k average + (1 - decay_k) net,   decay_k = min(decay, (1 + k) / (10 + k))

at update k = 0, 1, ... Until the limit is reached, what came before update j has a weight of about
(j / k)^9, so the average forgets its start and looks back over the last tenth of the run. The
same rule serves EMA teachers (zoo/teachers.py). `PowerEma` has the decay of an average that looks
back over a share of the run, from which others are made after training (post_hoc_ema.py). Buffers
are copied.
"""

from __future__ import annotations

import copy

from torch import nn

from trainers.ema.power_function import exponent
from zoo.teachers import Average, warmed_up


def frozen_copy(net: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights take no gradient."""
    return copy.deepcopy(net).requires_grad_(False).eval()


class Ema:
    """An average of a network's weights at one decay; `net` is in eval mode."""

    def __init__(self, net: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay {decay!r} must lie in [0, 1)")
        self.name = str(decay)
        self.decay = decay
        self.net = frozen_copy(net)
        self._average = Average(self.net, net)

    def update(self, step: int) -> None:
        """After update number `step`, counting from 0."""
        self._average.update(warmed_up(self.decay, step))


class PowerEma:
    """An average of a network's weights of one relative width; `net` is in eval mode."""

    def __init__(self, net: nn.Module, width: float):
        self.name = power_name(width)
        self._power = exponent(width) + 1
        self.net = frozen_copy(net)
        self._average = Average(self.net, net)

    def update(self, step: int) -> None:
        """After update number `step`, counting from 0."""
        self._average.update((step / (step + 1)) ** self._power)


def power_name(width: float) -> str:
    """What the average of this relative width is called among all averages of a run."""
    return f"power_{width}"
