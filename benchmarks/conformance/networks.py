"""Networks to test objectives with: random, exact, and ones that record or shift calls.

All keep the network's contract, compute in float64 and let forward-mode derivatives through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from backbones.mlp import MLP
from backbones.network import build_network
from registry.protocols import NULL_LABEL, Cond, Network
from zoo.ops import like
from zoo.oracles.on_path import OnPath as OnPath
from zoo.oracles.on_path import slope as slope

NUM_CLASSES = 2
VELOCITIES = ("u", "v")
Shape = tuple[int, ...]

_detach = torch.Tensor.detach  # kept, since a planted mistake may disable it


class Toy(nn.Module):
    """A random smooth network whose outputs share nothing but the input."""

    def __init__(self, shape: Shape, keys: Sequence[str], seed: int = 0, scale: float = 1.0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=rng, dtype=torch.float64))

        size, width, per_row = math.prod(shape), 16, outputs_per_row(tuple(keys))
        self.inner = nn.ParameterDict({key: draw(size + 2, width) for key in keys})
        self.label = nn.ParameterDict({key: draw(NUM_CLASSES + 1, width) for key in keys})
        self.outer = nn.ParameterDict({k: draw(width, 1 if k in per_row else size) for k in keys})
        for weight in self.outer.values():
            weight.data *= scale / width**0.5
        self.per_row = per_row

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        point = torch.cat([x.double().flatten(1), torch.stack([t, r], 1).double()], 1)
        label = None if cond is None else cond.get("label")
        return {key: self._output(key, point, label, x) for key in self.inner}

    def _output(self, key: str, point: Tensor, label: Tensor | None, x: Tensor) -> Tensor:
        hidden = point @ self.inner[key]
        if label is not None:
            hidden = hidden + self.label[key][label + 1]  # NULL_LABEL is -1
        out = torch.tanh(hidden) @ self.outer[key]
        return (out[:, 0] if key in self.per_row else out.reshape(x.shape)).to(x.dtype)


class ExactNetwork(nn.Module):
    """An oracle that makes just these outputs; those that it does not know are zero rows [b].

    `outputs` says which of its velocities an output is, such as {"twin": "v"}.
    """

    def __init__(
        self, oracle: nn.Module, keys: Sequence[str], outputs: Mapping[str, str] | None = None
    ):
        super().__init__()
        self.oracle, self.keys = oracle, tuple(keys)
        self.outputs = outputs or {key: key for key in VELOCITIES}

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        out, known = self.oracle(x, t, r, cond), self.outputs
        return {key: out[known[key]] if key in known else x.new_zeros(len(x)) for key in self.keys}


class WithMoments(nn.Module):
    """A network plus trainable functions of (x, t, r, label) on some outputs, zero at first.

    The gradient in them is the moment of a loss's slope with t, r, t r, s, t s, r s and l s, where
    s = tanh x and l is 1 and -1 for the two classes, and with each label. Zero at a fixed point.
    """

    def __init__(self, network: Network, size: int, keys: Sequence[str]):
        super().__init__()
        self.network = network
        zeros = {key: torch.zeros(size, 4 * size + 6, dtype=torch.float64) for key in keys}
        self.matrix = nn.ParameterDict({key: nn.Parameter(value) for key, value in zeros.items()})

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        out = dict(self.network(x, t, r, cond))
        s, times = x.double().flatten(1).tanh(), torch.stack([t, r, t * r], 1).double()
        label = None if cond is None else cond.get("label")
        label = torch.full((len(x),), NULL_LABEL) if label is None else label
        classes = one_hot(label + 1, NUM_CLASSES + 1).double()  # no label, class 0, class 1
        parts = (classes, times, s, times[:, :1] * s, times[:, 1:2] * s)
        features = torch.cat([*parts, (classes[:, 1:2] - classes[:, 2:]) * s], 1)
        for key, matrix in self.matrix.items():
            out[key] = out[key] + (features @ matrix.T).reshape(x.shape).to(x.dtype)
        return out


class Unlabelled(nn.Module):
    """The solution for labels that say nothing of the data: it ignores them."""

    def __init__(self, field: nn.Module):
        super().__init__()
        self.field = field

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        return self.field(x, t, r, None)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network by an objective."""

    x: Tensor
    t: Tensor
    r: Tensor
    labels: Tensor | None
    with_gradient: bool
    given: Tensor | None = None  # x with its graph
    entry: Tensor | None = None  # a zero leaf, added to x
    value: dict[str, Tensor] = field(default_factory=dict)  # zero weights, added to the outputs
    slope: dict[str, Tensor] = field(default_factory=dict)  # zero leaves, of derivatives alone


class Tapped(nn.Module):
    """Records every call and adds zeros to it, through which gradients are seen.

    `value` is a weight, as those of the network are: where an evaluation freezes the weights, no
    gradient reaches it. `slope` multiplies x - sg x, t - sg t and r - sg r, whose values are zero
    and whose derivatives are not: a gradient that reaches it runs through a derivative of the
    network. One that reaches `entry` runs through the input.
    """

    def __init__(self, net: Network, rows: int):
        super().__init__()
        self.net, self.calls = net, list[Evaluation]()
        # All are made here: none can be inside a jvp.
        self.weights = nn.ParameterList(self._leaf(rows) for _ in range(64))
        self.values = list(self.weights)
        self.slopes, self.entries = ([self._leaf(rows) for _ in range(64)] for _ in range(2))

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        labels = None if cond is None else cond.get("label")
        entry = self.entries.pop() if self.entries else None
        entered = x if entry is None else x + self._rows(entry, x)
        out = dict(self.net(entered, t, r, cond))
        known = _detach(x), _detach(t), _detach(r), labels, torch.is_grad_enabled()
        self.calls.append(call := Evaluation(*known, given=x, entry=entry))
        steps = (x - _detach(x), like(t - _detach(t), x), like(r - _detach(r), x))
        for key in [key for key in out if out[key].shape == x.shape and self.slopes]:
            # The weight is looked up by its number: it may be replaced while weights are frozen.
            weight = self.weights[len(self.slopes) - 1]
            call.value[key], call.slope[key] = self.values.pop(), self.slopes.pop()
            value, slope = self._rows(weight, x), self._rows(call.slope[key], x)
            out[key] = out[key] + value + sum(slope * step for step in steps)
        return out

    @staticmethod
    def _leaf(rows: int) -> Tensor:
        return nn.Parameter(torch.zeros(8 * rows, dtype=torch.float64))

    @staticmethod
    def _rows(leaf: Tensor, x: Tensor) -> Tensor:
        return leaf[: len(x)].reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


class Shifted(nn.Module):
    """Adds `eps` + a trainable `bias` to one output of one call, on or off the diagonal r = t.

    With `call` None it adds them in every call that has a gradient. Targets are other calls, so
    they stay at the truth, unless the error is `everywhere`: then eps is added in all calls. It is
    also added `at` the points of a call, whichever call asks for them: the output is a function.
    """

    def __init__(
        self,
        net: Network,
        key: str,
        eps: float,
        call: int | None = None,
        diagonal: bool | None = None,
        *,
        everywhere: bool = False,
        at: Evaluation | None = None,
    ):
        super().__init__()
        self.net, self.key, self.eps, self.call = net, key, eps, call
        self.diagonal, self.everywhere, self.at, self.num_calls = diagonal, everywhere, at, 0
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, cond: Cond | None = None
    ) -> dict[str, Tensor]:
        out, index = self.net(x, t, r, cond), self.num_calls
        self.num_calls += 1
        chosen = torch.is_grad_enabled() if self.call is None else index == self.call
        erring = torch.full_like(t, chosen or self.everywhere)
        if self.at is not None and not chosen:
            erring = _among(self.at, x, t, r).to(t.dtype)
        rows = torch.ones_like(t) if self.diagonal is None else ((t == r) == self.diagonal)
        error = like((rows * erring).to(x.dtype), x) * self.eps
        return {
            **out, self.key: out[self.key] + error + like(rows.to(x.dtype), x) * self.bias * chosen
        }  # fmt: skip


def _among(call: Evaluation, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Which rows [b] are points of the call."""
    known = torch.cat([call.x.flatten(1), torch.stack([call.t, call.r], 1)], 1)
    asked = torch.cat([_detach(x).flatten(1), _detach(torch.stack([t, r], 1))], 1)
    return (asked[:, None] == known).all(2).any(1)


@functools.cache
def outputs_per_row(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The outputs that have one number for each row, found by building a small network."""
    net = build_network(functools.partial(MLP, dim=8, depth=1), (2,), 0, keys)
    out = net(torch.zeros(1, 2), torch.ones(1), torch.zeros(1), None)
    return tuple(key for key in keys if out[key].ndim == 1)
