"""The derivative that rides on the forward of the prediction, and how an objective asks for both.

An objective that differentiates the network where it also predicts needs one forward, not two: the
tangent then costs one product beside each of the layers', and the forward keeps its fused kernels.
In forwards of the batch, MeanFlow with a quarter of its rows off the diagonal takes 3 + 1/4 instead
of 3 + 2/4, and an exact derivative of every row 3 + 1 instead of 3 + 2.

`dual`, in a pass of its own, stays for what this cannot follow: weights that ZeRO stage 3 releases
behind each layer, compiled networks, an autograd.Function, operations in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from registry import derivatives
from registry.protocols import Cond, Derivative, JointDerivative, Network
from zoo.derivatives.dual_tensors import Flowing, Lifted, Record, Tape, rule_of, settled
from zoo.derivatives.methods import (
    NO_TANGENT,
    Dual,
    derivative_of_u,
    eager,
    no_gradient,
    replay_rng,
    with_derivatives,
)
from zoo.ops import first_rows, rows_from

Point = tuple[Tensor, Tensor, Tensor]  # x [b *d], t [b], r [b]; or tangents of these
Outputs = Mapping[str, Tensor]
Moved = Callable[[Point], Tensor]  # du/ds [b *d] along tangents of (x, t, r)


@derivatives.register("one_pass")
@dataclass(frozen=True, kw_only=True)
class OnePass:
    """Exact, by the forward that makes the prediction; not in ZeRO stage 3, not compiled."""

    needs_forward_ad: ClassVar = True

    @property
    def in_own_pass(self) -> Derivative:
        return Dual()

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        with no_gradient(), replay_rng():
            return self.with_value(lambda *at: {"": fn(*at)}, primals, tangents, "")[1]

    def with_value(
        self,
        fn: Callable[..., Outputs],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The outputs of fn with their graph, and the derivative of one of them without."""
        record = Flowing(rule_of)
        slots = [tangent.detach() for tangent in tangents]
        try:
            out, moving = self._run(fn, primals, slots, record, key)
        finally:
            record.ended = True
        return out, moving.slot

    def linearized(
        self, fn: Callable[..., Outputs], primals: Sequence[Tensor], key: str
    ) -> tuple[dict[str, Tensor], Callable[[Sequence[Tensor]], Tensor]]:
        """The outputs of fn with their graph, and the derivative of one by tangents; for one call.

        What the derivative needs of the forward is kept until then, even what checkpointing drops.
        """
        record = Tape(rule_of)
        try:
            out, moving = self._run(fn, primals, [record.slot() for _ in primals], record, key)
        finally:
            tape = record.taken()
        wanted = moving.slot
        return out, lambda tangents: tape.replay([d.detach() for d in tangents], wanted)

    def _run(
        self,
        fn: Callable[..., Outputs],
        primals: Sequence[Tensor],
        slots: Sequence[object],
        record: Record,
        key: str,
    ) -> tuple[dict[str, Tensor], Lifted]:
        with eager():
            out = fn(*(Lifted(p.detach(), s, record) for p, s in zip(primals, slots, strict=True)))
        if not isinstance(moving := out[key], Lifted):
            raise RuntimeError(NO_TANGENT)
        return {name: settled(value) for name, value in out.items()}, moving


def apart(objective: Any) -> Any:
    """The same objective with each of its derivatives in a pass of its own."""

    def choose(derivative: Derivative) -> Derivative:
        return derivative.in_own_pass if isinstance(derivative, JointDerivative) else derivative

    return with_derivatives(objective, choose)


def outputs_and_derivative(
    derivative: Derivative | None, net: Network, cond: Cond | None, point: Point, tangents: Point
) -> tuple[dict[str, Tensor], Tensor]:
    """The network's outputs [b *d] at (x, t, r), and du/ds [k *d] of its first k rows.

    There are k rows of tangents; None for a derivative that no row of any share takes.
    """
    k, (x, t, r) = len(tangents[0]), point
    given, first = first_rows(cond, k), (x[:k], t[:k], r[:k])
    if not isinstance(derivative, JointDerivative):
        out = dict(net(*point, cond))
        if derivative is None:
            return out, torch.zeros_like(tangents[0])
        return out, derivative_of_u(derivative, net, given, first, tangents)
    if k == 0:
        return dict(net(*point, cond)), torch.zeros_like(tangents[0])
    out, du = derivative.with_value(lambda x, t, r: net(x, t, r, given), first, tangents, "u")
    if k == len(x):
        return out, du
    rest = net(x[k:], t[k:], r[k:], rows_from(cond, k))
    return {name: torch.cat([out[name], rest[name]]) for name in out}, du


def outputs_then_derivative(
    derivative: Derivative | None, net: Network, cond: Cond | None, point: Point
) -> tuple[dict[str, Tensor], Moved]:
    """The network's outputs at (x, t, r), and du/ds by tangents that may depend on them; once."""
    if isinstance(derivative, JointDerivative):
        return derivative.linearized(lambda x, t, r: net(x, t, r, cond), point, "u")

    def moved(tangents: Point) -> Tensor:
        if derivative is None:
            raise TypeError("a residual without a derivative asks for one")
        return derivative_of_u(derivative, net, cond, point, tangents)

    return dict(net(*point, cond)), moved
