"""The contracts of a derivative of the network: as a target, with the value, or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Derivative(Protocol):
    """(fn, primals, tangents) -> d/ds fn(primals + s tangents) at s=0, without gradient.

    It takes a pass of its own, unless it is a JointDerivative. `needs_forward_ad` says whether
    every operation of the network needs a forward-mode rule. One that declares `differentiable =
    True` is a DifferentiableDerivative too.
    """

    needs_forward_ad: ClassVar[bool]

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor: ...


@runtime_checkable
class JointDerivative(Derivative, Protocol):
    """A derivative that can be taken together with the value, in the forward of the prediction.

    `fn` gives the outputs by name, and the derivative is that of the output `key`. `with_value`
    returns the outputs with their graph and the derivative without. `linearized` returns the
    outputs and a function from tangents to the derivative, which may be called once. `in_own_pass`
    is the derivative that takes its place where the forward cannot be followed: where weights are
    not whole while the network runs, and where networks are compiled.

    One that declares `tests_rows = True` takes `with_value(..., apart=True)`, which raises
    NotImplementedError if rows depend on one another. It is asked so where the rows that it is
    given are apart from others of their batch.
    """

    @property
    def in_own_pass(self) -> Derivative: ...
    def with_value(
        self,
        fn: Callable[..., Mapping[str, Tensor]],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
    ) -> tuple[dict[str, Tensor], Tensor]: ...
    def linearized(
        self, fn: Callable[..., Mapping[str, Tensor]], primals: Sequence[Tensor], key: str
    ) -> tuple[dict[str, Tensor], Callable[[Sequence[Tensor]], Tensor]]: ...


@runtime_checkable
class DifferentiableDerivative(Derivative, Protocol):
    """A derivative that is trained: the loss sends a gradient through it to the weights.

    `with_graph` returns the outputs of `fn` by name and the derivative of the output `key`, under
    the same dropout masks. Both have their graph: to the weights, and to the primals and tangents
    that have one. It detaches nothing; what an objective holds fixed, it detaches itself. An
    objective that calls `with_graph` declares `differentiates = ("derivative",)`, and is then given
    a derivative whose `differentiable` is True, or refused before training.
    """

    differentiable: ClassVar[bool]

    def with_graph(
        self,
        fn: Callable[..., Mapping[str, Tensor]],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
    ) -> tuple[dict[str, Tensor], Tensor]: ...
