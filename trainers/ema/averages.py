"""Running averages of the weights, for sampling and evaluation.

    average <- decay_k average + (1 - decay_k) net,   decay_k = min(decay, (1 + k) / (10 + k))

at update k = 0, 1, ... Until decay_k reaches its limit, all weights from before update j together
count for about (j / k)^9 of the average, so it forgets its start and looks back over the last tenth
of the run. EMA teachers follow the same rule (zoo/teachers.py). This warm-up is ours: the released
codes of Shortcut, MeanFlow and iMF use the full decay from the first step on. `PowerEma` has
another decay, with which the average always looks back over the same share of the run; averages of
other widths are made from such ones after training (reconstruction.py). Buffers are copied, not
averaged.
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
    """An average of a network's weights of relative width `sigma_rel`; `net` is in eval mode."""

    def __init__(self, net: nn.Module, sigma_rel: float):
        self.name = power_name(sigma_rel)
        self._power = exponent(sigma_rel) + 1
        self.net = frozen_copy(net)
        self._average = Average(self.net, net)

    def update(self, step: int) -> None:
        """After update number `step`, counting from 0."""
        self._average.update((step / (step + 1)) ** self._power)


def power_name(sigma_rel: float) -> str:
    """The name, among all averages of a run, of the one with this relative width."""
    return f"power_{sigma_rel}"
