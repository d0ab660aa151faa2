"""Teachers evaluate the targets: each turns the network in training into one without gradient.

`online` is that network itself, `ema` a running average of its weights, and `frozen` another
network that never changes. `through(net)` evaluates the same weights with a gradient to the inputs:
none reaches the weights, but one passes on to x, for a target at a predicted point or a loss on
what a trained network sees there.

With `dropout = "off"` targets are evaluated in eval mode, with `dropout = "shared"` under the masks
of the prediction (dropout.py).

The decay of `ema` at update k = 0, 1, ... is min(decay, (1 + k) / (10 + k)), and an update follows
each optimizer step. This warm-up is ours. The released code of Shortcut keeps a constant 0.999 from
the first step on. That of TwinFlow, after RCGM, starts at kappa = 0, sets kappa <- kappa + (1 -
kappa) (decay - kappa) / 2 after each update, updates before the optimizer step, so that its average
is one step older, evaluates the average in training mode, and has 0.99 as its default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from registry import teachers
from registry.protocols import Cond, Network
from zoo.derivatives.methods import no_gradient
from zoo.dropout import Dropout, check_dropout, masks_of_the_prediction

_NOT_ATTACHED = (
    "it has no weights of its own yet. In a training loop of your own, call teacher.attach("
    "copy.deepcopy(net)) once before the first step, and teacher.update(net, step) after each "
    "optimizer step, where teacher is the objective's, such as objective.teacher, and step counts "
    "from 0. trainers.fit does both"
)


def without_gradient(
    net: Network, dropout: Dropout = "off", beside: Network | None = None
) -> Network:
    """The same network, evaluated without gradient and in eval mode.

    With shared dropout it is in the mode of `beside`, the network in training, and under its masks.
    """
    return _within(net, no_gradient, dropout, beside)


def to_inputs(net: Network, dropout: Dropout = "off", beside: Network | None = None) -> Network:
    """The same with a gradient to the inputs, and none to the weights."""
    return _within(net, lambda: _fixed_weights(net), dropout, beside)


def _within(
    net: Network,
    gradient: Callable[[], AbstractContextManager[None]],
    dropout: Dropout,
    beside: Network | None,
) -> Network:
    training = dropout == "shared" and getattr(beside, "training", False)

    def evaluate(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
        with gradient(), _mode(net, training):
            if dropout == "off":
                return net(x, t, r, cond)
            with masks_of_the_prediction():
                return net(x, t, r, cond)

    return evaluate


@contextmanager
def _mode(net: Network, training: bool) -> Iterator[None]:
    if not isinstance(net, nn.Module) or net.training == training:
        yield
        return
    net.train(training)
    try:
        yield
    finally:
        net.train(not training)


@contextmanager
def _fixed_weights(net: Network) -> Iterator[None]:
    """Weights take no gradient in the `with` block; autocast caches no copies of such weights."""
    moving = [p for p in net.parameters() if p.requires_grad] if isinstance(net, nn.Module) else []
    for p in moving:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)


@teachers.register("online")
@dataclass(frozen=True, kw_only=True)
class Online:
    """The network in training itself, behind a stop-gradient."""

    needs_copy: ClassVar = False
    distils: ClassVar = False

    dropout: Dropout = "off"

    def __post_init__(self) -> None:
        check_dropout("online", self.dropout)

    def __call__(self, net: Network) -> Network:
        return without_gradient(net, self.dropout, net)

    def through(self, net: Network) -> Network:
        return to_inputs(net, self.dropout, net)

    def attach(self, network: nn.Module) -> None:
        raise TypeError("the online teacher has no weights of its own")

    def update(self, net: nn.Module, step: int) -> None:
        pass


@teachers.register("ema")
@dataclass(kw_only=True)
class EmaTeacher:
    """An exponential moving average of the weights, with a decay that warms up from 0.1."""

    needs_copy: ClassVar = True
    distils: ClassVar = False

    decay: float = 0.999
    dropout: Dropout = "off"
    network: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _average: Average | None = field(default=None, init=False, repr=False, compare=False)
    _used_without: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay = {self.decay!r} must lie in [0, 1)")
        check_dropout("ema", self.dropout)

    def __call__(self, net: Network) -> Network:
        """The average behind a stop-gradient; before `attach` the network itself, for one loss.

        ValueError at the second loss with gradient without `attach`: the network has been trained
        since the first, and a teacher that follows it at once makes some objectives diverge. Losses
        under `torch.no_grad()` do not count.
        """
        return without_gradient(self._evaluated(net), self.dropout, net)

    def through(self, net: Network) -> Network:
        """The average with a gradient to its inputs; before `attach` as in a call."""
        return to_inputs(self._evaluated(net), self.dropout, net)

    def attach(self, network: nn.Module) -> None:
        self.network, self._average = network, None

    def update(self, net: nn.Module, step: int) -> None:
        if self.network is None:
            raise ValueError(f"the EMA teacher is to be updated, and {_NOT_ATTACHED}")
        if self._average is None or self._average.net is not net:
            self._average = Average(self.network, net)
        self._average.update(warmed_up(self.decay, step))

    def _evaluated(self, net: Network) -> Network:
        if self.network is not None:
            return self.network
        if torch.is_grad_enabled():
            if self._used_without:
                raise ValueError(f"the EMA teacher is used in a second loss, and {_NOT_ATTACHED}")
            self._used_without = True
        return net


@teachers.register("frozen")
@dataclass(kw_only=True)
class Frozen:
    """A trained network that never changes; it is loaded, or trained first in this run.

    `checkpoint` is the folder of a finished run of flow matching, an exported folder, or a public
    checkpoint; `layout` is the layout of a public checkpoint whose tensor names do not tell it.
    `pretrain` in (0, 1) is the share of this run's budget that first trains a teacher with flow
    matching. Give exactly one of the two, or neither and `attach` a network.
    """

    needs_copy: ClassVar = False
    distils: ClassVar = True
    local_paths: ClassVar = ("checkpoint",)

    checkpoint: str = ""
    layout: str = ""
    pretrain: float = 0.0
    dropout: Dropout = "off"
    network: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.pretrain < 1:
            raise ValueError(f"frozen.pretrain = {self.pretrain!r} must lie in [0, 1)")
        if self.checkpoint and self.pretrain:
            raise ValueError("frozen.checkpoint and frozen.pretrain exclude each other; give one")
        check_dropout("frozen", self.dropout)

    def __call__(self, net: Network) -> Network:
        return without_gradient(self._trained(), self.dropout, net)

    def through(self, net: Network) -> Network:
        return to_inputs(self._trained(), self.dropout, net)

    def attach(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False).eval()

    def update(self, net: nn.Module, step: int) -> None:
        pass

    def _trained(self) -> nn.Module:
        if self.network is None:
            raise ValueError(
                "the frozen teacher has no network: bind frozen.checkpoint to the folder of a "
                "finished run, or frozen.pretrain to a share of the budget such as 0.5"
            )
        return self.network


def warmed_up(decay: float, step: int) -> float:
    """The decay of update number `step`, counting from 0: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


class Average:
    """average <- decay average + (1 - decay) net, in one fused update; buffers are copied.

    The lists of tensors are made once, since walking a module's tree costs as much as the update.
    """

    def __init__(self, average: nn.Module, net: nn.Module):
        self.net = net
        self._means: list[Tensor] = list(average.parameters())
        self._params: list[Tensor] = list(net.parameters())
        self._buffers = list(zip(average.buffers(), net.buffers(), strict=True))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(self._means, self._params, 1 - decay)
        for mean, current in self._buffers:
            mean.copy_(current)
