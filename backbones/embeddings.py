"""The conditioning of every trunk, c = SiLU(e(t) + e'(t - r or r) + e''(label)), and positions.

A time in [0, 1] enters unscaled, as cos(w t) and sin(w t) with angular frequencies w from 1 to
`max_frequency` in geometric progression. Times multiplied by 1000, as in DiT, would multiply the
time tangent of a forward-mode derivative by 1000 and spoil finite differences; here a feature's
derivative is at most max_frequency. The default, 8, gave MeanFlow the smallest map error on an
eight-mode mixture (0.23 and 0.23 in two seeds; 0.23 and 0.26 at 4, 0.25 and 0.28 at 16), and made
no difference to flow matching. Whether the second time is the interval h = t - r or the end r
itself is decided in this file and nowhere else.

`time_features = 'dit'` takes the frequencies of the released DiT codes, 10000^(-k/128) times
max_frequency, for weights that were trained with them (pretrained/imports.py). SiT and LightningDiT
have max_frequency 1, and a code that scales its times has 1000. 'ddpm' takes 10000^(-k/127), the
table of the U-Nets.

The embeddings start with about unit variance, not with DiT's standard deviation of 0.02. On the 8x8
digits a DiT then reached in 180 steps a loss that otherwise took 330, and both ended alike.
The second embedder's last layer starts at zero, so that a two-time network begins as the one-time
network with the same weights; it is made last, so that both draw the same initial weights.

Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from registry.protocols import NULL_LABEL, Cond

NUM_FREQUENCIES = 128
SECOND_TIMES = ("h", "r")
TIME_FEATURES = ("unit", "dit", "ddpm")


class TimeEmbedding(nn.Module):
    """t [b] -> [b dim]: sinusoidal features and a SiLU MLP with one hidden layer."""

    def __init__(
        self, dim: int, max_frequency: float, features: str = "unit", *, zero_output: bool = False
    ):
        super().__init__()
        self.max_frequency, self.features = max_frequency, features
        self.hidden = nn.Linear(2 * NUM_FREQUENCIES, dim)
        self.output = nn.Linear(dim, dim)
        for layer in (self.hidden, self.output):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        if zero_output:
            nn.init.zeros_(self.output.weight)

    def forward(self, t: Tensor) -> Tensor:
        features = time_features(t, self.max_frequency, self.features)
        return self.output(F.silu(self.hidden(features.to(self.hidden.weight.dtype))))


def time_features(t: Tensor, max_frequency: float, features: str) -> Tensor:
    """cos(w t), then sin(w t), for the angular frequencies w: [b 2 * NUM_FREQUENCIES]."""
    angles = t[:, None] * frequencies(max_frequency, features, t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def frequencies(max_frequency: float, features: str, device: torch.device | None = None) -> Tensor:
    """The angular frequencies [NUM_FREQUENCIES].

    They are computed at each call, because an engine in bfloat16 would round a buffer.
    """
    if features == "unit":
        exponents = torch.linspace(0, 1, NUM_FREQUENCIES, device=device)
        return (max_frequency**exponents).bfloat16().float()
    last = NUM_FREQUENCIES if features == "dit" else NUM_FREQUENCIES - 1
    k = torch.arange(NUM_FREQUENCIES, device=device)
    return max_frequency * torch.exp(-math.log(10000) / last * k)


class LabelEmbedding(nn.Module):
    """cond["label"] [b] -> [b dim]; the last row stands for NULL_LABEL and for no labels at all."""

    null: Tensor

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)
        self.register_buffer("null", torch.tensor([num_classes]), persistent=False)

    def forward(self, cond: Cond | None) -> Tensor:
        if cond is None or "label" not in cond:
            return self.table(self.null)  # [1 dim]
        label = cond["label"]
        return self.table(torch.where(label == NULL_LABEL, self.num_classes, label))


class GuidanceEmbedding(nn.Module):
    """cond["guidance"] [b 3], a scale and the interval of times where it holds -> [b dim].

    The scale w >= 1 enters as 1 - 1/w. Where the condition has no guidance, w is 1 at all times.
    The output starts at zero, so that a network begins as the one without this input.
    """

    def __init__(self, dim: int, max_frequency: float, features: str):
        super().__init__()
        self.max_frequency, self.features = max_frequency, features
        self.hidden = nn.Linear(3 * 2 * NUM_FREQUENCIES, dim)
        self.output = nn.Linear(dim, dim)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        nn.init.zeros_(self.hidden.bias)
        zero_(self.output)

    def forward(self, cond: Cond | None, t: Tensor) -> Tensor:
        given = None if cond is None else cond.get("guidance")
        if given is None:
            given = torch.tensor([[1.0, 0.0, 1.0]], dtype=t.dtype, device=t.device)
        scale, low, high = given.to(t.dtype).unbind(1)
        features = [
            time_features(z, self.max_frequency, self.features) for z in (1 - 1 / scale, low, high)
        ]
        hidden = self.hidden(torch.cat(features, dim=1).to(self.hidden.weight.dtype))
        return self.output(F.silu(hidden))


class Conditioning(nn.Module):
    """(t [b], r [b], cond) -> c [b dim], in the precision of the weights under autocast too."""

    def __init__(
        self,
        dim: int,
        *,
        num_classes: int,
        two_times: bool,
        second_time: str,
        max_frequency: float,
        time_features: str = "unit",
        guidance_input: bool = False,
    ):
        super().__init__()
        check_times(second_time, max_frequency, time_features)
        self.second_is_interval = second_time == "h"
        self.time = TimeEmbedding(dim, max_frequency, time_features)
        self.label = LabelEmbedding(dim, num_classes) if num_classes else None
        self.second_time = (
            TimeEmbedding(dim, max_frequency, time_features, zero_output=True)
            if two_times
            else None
        )
        self.guidance = (
            GuidanceEmbedding(dim, max_frequency, time_features) if guidance_input else None
        )

    def forward(self, t: Tensor, r: Tensor, cond: Cond | None) -> Tensor:
        with full_precision(t.device.type):
            c = self.time(t)
            if self.label is not None:
                c = c + self.label(cond)
            if self.second_time is not None:
                c = c + self.second_time(t - r if self.second_is_interval else r)
            if self.guidance is not None:
                c = c + self.guidance(cond, t)
            return F.silu(c)


def check_times(second_time: str, max_frequency: float, time_features: str) -> None:
    """ValueError unless these settings of the time embeddings are allowed."""
    if second_time not in SECOND_TIMES:
        raise ValueError(
            f"second_time = {second_time!r}; allowed are 'h' (the interval t - r) and 'r'"
        )
    if max_frequency < 1:
        raise ValueError(f"max_frequency = {max_frequency}; it must be at least 1")
    if time_features not in TIME_FEATURES:
        raise ValueError(
            f"time_features = {time_features!r}; allowed are {', '.join(TIME_FEATURES)}"
        )


def positions_2d(height: int, width: int, dim: int) -> Tensor:
    """[height * width, dim] sines and cosines, in DiT's order: sin x, cos x, sin y, cos y."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y = torch.arange(height).repeat_interleave(width)[:, None] * frequencies
    x = torch.arange(width).repeat(height)[:, None] * frequencies
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Zero weight and bias."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off on this kind of device."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # such as the meta device, which has no autocast
