"""One forward pass for a prediction and its derivative, and how an objective asks for both.

An objective that differentiates the network where it also predicts needs one forward pass, not two:
each layer then computes one more product, for the tangent, and the value keeps its fused kernels.
In forward passes of the batch, MeanFlow with a quarter of its rows off the diagonal takes 3 + 1/4
instead of 3 + 2/4, and an exact derivative of every row takes 3 + 1 instead of 3 + 2.

`one_pass` cannot follow weights that ZeRO stage 3 releases behind each layer, compiled networks, an
autograd.Function, or operations in place. `dual`, in a pass of its own, is for most of these; each
refusal names what serves.

Where some rows of the batch have a derivative and some have none, the two kinds pass the network
one after the other. A network whose rows depend on one another is refused there (rows.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from registry import derivatives
from registry.protocols import Cond, Derivative, JointDerivative, Network
from zoo.derivatives.dual_tensors import (
    DualTensor,
    EagerRecord,
    LinearizedRecord,
    TangentRecord,
    primal_of,
    rule_of,
)
from zoo.derivatives.dual_tensors.refusals import BY_DIFFERENCES, refuse
from zoo.derivatives.forward_rules import SET_DATA, STATISTICS, Replaced
from zoo.derivatives.methods import (
    NO_TANGENT,
    Dual,
    derivative_of_u,
    eager,
    own_pass,
    with_derivatives,
)
from zoo.derivatives.rows import WatchedRecord, has_values
from zoo.ops import first_rows, rows_from

Point = tuple[Tensor, Tensor, Tensor]  # x [b *d], t [b], r [b]; or tangents of these
Outputs = Mapping[str, Tensor]
# Networks, by identity and mode, whose rows were found not to depend on one another.
FOUND_APART: WeakValueDictionary[tuple[int, bool], Network] = WeakValueDictionary()
DerivativeOfU = Callable[[Point], Tensor]  # du/ds [b *d] along tangents of (x, t, r)


@derivatives.register("one_pass")
@dataclass(frozen=True, kw_only=True)
class OnePass:
    """Exact, in the forward pass of the prediction; not for ZeRO stage 3, nor compiled networks."""

    needs_forward_ad: ClassVar = True
    differentiable: ClassVar = False
    tests_rows: ClassVar = True

    @property
    def in_own_pass(self) -> Derivative:
        return Dual()

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        with own_pass(), _OwnPass(STATISTICS):
            return self.with_value(lambda *at: {"": fn(*at)}, primals, tangents, "")[1]

    def with_value(
        self,
        fn: Callable[..., Outputs],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
        *,
        apart: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The outputs of fn with their graph, and the derivative of output `key` without a graph.

        `apart` asks for a test that the rows do not depend on one another. RuntimeError if that
        output has no tangent; NotImplementedError if `fn` does what one_pass cannot follow.
        """
        along = [d.detach() for d in tangents]
        watched = WatchedRecord(len(along[0]), along[0].device) if apart else None
        record = watched or EagerRecord(rule_of)
        refs = watched.pairs(along) if watched else along
        try:
            out, dual = self._run(fn, primals, refs, record, key)
        finally:
            record.ended = True
        return out, watched.check(dual.tangent) if watched else dual.tangent

    def linearized(
        self, fn: Callable[..., Outputs], primals: Sequence[Tensor], key: str
    ) -> tuple[dict[str, Tensor], Callable[[Sequence[Tensor]], Tensor]]:
        """The outputs of fn with their graph, and a function: tangents -> derivative of `key`.

        That function can be called once. Until then it keeps the primals that the derivative needs,
        even those that activation checkpointing would drop. Errors are those of `with_value`.
        """
        record = LinearizedRecord(rule_of)
        inputs = [record.new_tangent() for _ in primals]
        try:
            out, dual = self._run(fn, primals, inputs, record, key)
        finally:
            finished = record.finished()
        wanted = dual.tangent
        return out, lambda tangents: finished.replay([d.detach() for d in tangents], wanted)

    def with_graph(self, *_: Any) -> NoReturn:
        """NotImplementedError: tangents are computed without a graph here."""
        raise NotImplementedError(
            "one_pass gives a derivative without a gradient of its own, and this objective trains "
            "its derivative; bind @dual(), which gives both in one pass"
        )

    def _run(
        self,
        fn: Callable[..., Outputs],
        primals: Sequence[Tensor],
        refs: Sequence[object],
        record: TangentRecord,
        key: str,
    ) -> tuple[dict[str, Tensor], DualTensor]:
        inputs = [DualTensor(p.detach(), ref, record) for p, ref in zip(primals, refs, strict=True)]
        with eager():
            out = fn(*inputs)
        if not isinstance(dual := out[key], DualTensor):
            raise RuntimeError(NO_TANGENT)
        return {name: primal_of(value) for name, value in out.items()}, dual


class _OwnPass(Replaced):
    """The mode of a pass of its own, such as that of the start-up probe.

    It refuses `plain.data = y` of a plain tensor, which would end the process: torch gives the
    plain tensor what a `DualTensor` does not have. A mode costs time, so passes of the training,
    which follow the probe, do without it.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == SET_DATA and any(type(one) is DualTensor for one in args):
            refuse("x.data = y, which exchanges the data of a tensor", BY_DIFFERENCES)
        return super().__torch_function__(func, types, args, kwargs)


def apart(objective: Any) -> Any:
    """The same objective with each of its derivatives in a pass of its own."""

    def choose(derivative: Derivative) -> Derivative:
        return derivative.in_own_pass if isinstance(derivative, JointDerivative) else derivative

    return with_derivatives(objective, choose)


def with_graphs(objective: Any) -> Any:
    """The same objective with derivatives that can be trained.

    One without a graph gives way to its `in_own_pass`. ValueError if that has none either.
    """

    def choose(derivative: Derivative) -> Derivative:
        own = derivative.in_own_pass if isinstance(derivative, JointDerivative) else derivative
        for candidate in (derivative, own):
            if getattr(candidate, "differentiable", False):
                return candidate
        raise ValueError(
            f"the objective {type(objective).__name__} trains its derivative, and {derivative!r} "
            "gives one without a gradient of its own (differentiable is not True). Bind @dual(), "
            "@jvp() or @finite_difference()"
        )

    return with_derivatives(objective, choose)


def outputs_and_derivative(
    derivative: Derivative | None, net: Network, cond: Cond | None, point: Point, tangents: Point
) -> tuple[dict[str, Tensor], Tensor]:
    """The network's outputs [b *d] at the point (x, t, r), and du/ds [k *d] of its first k rows.

    `tangents` have k rows, 0 <= k <= b. `derivative` is None if no share of the batch has a row to
    differentiate; du/ds is then zero. With 0 < k < b a JointDerivative lets the first k rows pass
    the network apart from the others, and any other derivative sees those rows alone. The first
    such pass of a network tests that its rows do not depend on one another (NotImplementedError).
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

    def of_first(x: Tensor, t: Tensor, r: Tensor) -> dict[str, Tensor]:
        return net(x, t, r, given)

    if k == len(x):
        return derivative.with_value(of_first, first, tangents, "u")
    mode = id(net), getattr(net, "training", False)
    apart = k > 1 and FOUND_APART.get(mode) is not net and has_values(x)
    apart = apart and getattr(derivative, "tests_rows", False)
    test: Mapping[str, Any] = {"apart": True} if apart else {}
    out, du = derivative.with_value(of_first, first, tangents, "u", **test)
    if apart and bool(du.any()):  # a network that starts at zero shows nothing yet
        FOUND_APART[mode] = net
    rest = net(x[k:], t[k:], r[k:], rows_from(cond, k))
    return {name: torch.cat([out[name], rest[name]]) for name in out}, du


def outputs_then_derivative(
    derivative: Derivative | None, net: Network, cond: Cond | None, point: Point
) -> tuple[dict[str, Tensor], DerivativeOfU]:
    """The network's outputs at the point (x, t, r), and a function: tangents -> du/ds [b *d].

    The tangents may depend on the outputs. The function can be called once.
    """
    if isinstance(derivative, JointDerivative):
        return derivative.linearized(lambda x, t, r: net(x, t, r, cond), point, "u")

    def du_along(tangents: Point) -> Tensor:
        if derivative is None:
            raise TypeError(
                "a residual without a derivative asks for du/ds; give it a field `derivative`, "
                "such as @one_pass()"
            )
        return derivative_of_u(derivative, net, cond, point, tangents)

    return dict(net(*point, cond)), du_along
