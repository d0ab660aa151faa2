"""A tensor with a tangent: forward-mode differentiation inside an ordinary forward pass.

A `DualTensor` holds a value, its primal, and the derivative of that value along the tangents of
the inputs. A function that is called with it computes its value as usual: with the same kernels,
and with the graph that the gradient needs. The tangent follows by a rule (rules.py, layers.py) that
reads primals and keeps no graph. One forward pass therefore gives both. torch's own dual numbers
need a second forward pass, or a graph of the derivative and attention without its fused kernel.

The tangents of the inputs may be known before the pass (`EagerRecord`), or only after it, because
they are made of the outputs of the pass (`LinearizedRecord`).

No tangent is lost in silence. An autograd.Function and compiled code use a `DualTensor` without
calling the rules, so both end in an error that says so. A .detach() removes the tangent, as it does
for torch's dual numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from zoo.derivatives.dual_tensors.refusals import (
    check_no_function,
    check_one_record,
    check_unchanged,
    check_writes_nowhere,
    name_of,
    refuse_compiled,
    refuse_gradient,
)

TangentRef = Any  # a tangent (EagerRecord), or the number that stands for one (LinearizedRecord)
Resolve = Callable[[TangentRef], Tensor]  # from a reference to the tangent itself
JvpFn = Callable[[Resolve], Any]  # the tangents of the outputs, from those of the inputs
RuleOutput = tuple[Any, JvpFn | None]  # the outputs; None if none of them has a tangent
JvpRule = Callable[..., RuleOutput]  # called with the function and its arguments


class TangentRecord(Protocol):
    """Finds the rule of a function, and decides when the rule's `jvp` is called."""

    rule_of: Callable[[Any], JvpRule]

    def output_tangents(
        self, jvp: JvpFn, inputs: Sequence[TangentRef], outputs: Sequence[Tensor]
    ) -> Sequence[TangentRef]:
        """A reference for each of `outputs`; None for an output without a tangent."""
        ...


# The output of such a Function is an ordinary tensor, which no check meets. Its gradient would end
# at the outer tensor and never reach the primal, so a hook on the outer tensor refuses it.
GUARD: dict[int, Callable[[Tensor], Tensor | None]] = {0: refuse_gradient}


class DualTensor(Tensor):
    """A `primal` with its graph, and a reference to its `tangent`, which `record` resolves."""

    primal: Tensor
    tangent: TangentRef
    record: TangentRecord
    version: int  # of the primal's values

    @staticmethod
    def __new__(cls, primal: Tensor, tangent: TangentRef, record: TangentRecord) -> DualTensor:
        # The outer tensor has no data. It requires a gradient where the primal does. An
        # autograd.Function sees the outer tensor alone, and so leaves a grad_fn on its output.
        made: DualTensor = Tensor._make_wrapper_subclass(
            cls,
            primal.shape,
            dtype=primal.dtype,
            device=primal.device,
            requires_grad=primal.requires_grad,
        )
        if primal.requires_grad:
            made._backward_hooks = GUARD
        made.primal, made.tangent, made.record = primal, tangent, record
        made.version = primal._version
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            given = dual_tensors_among((*args, *kwargs.values()) if kwargs else args)
            check_writes_nowhere(func, kwargs)
            record = given[0].record
            for one in given:
                check_no_function(one)
                check_unchanged(name_of(func), one.primal, one.version)
                check_one_record(func, one.record, record)
            out, jvp = record.rule_of(func)(func, *args, **kwargs)
            return out if jvp is None else _with_tangents(out, jvp, record, given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        refuse_compiled(func)


class EagerRecord:
    """For tangents of the inputs that are known: each operation computes its output's at once.

    When the pass has `ended`, outputs get no tangents any more: activation checkpointing computes
    blocks again in the backward pass, and needs their values alone.
    """

    def __init__(self, rule_of: Callable[[Any], JvpRule]):
        self.rule_of = rule_of
        self.ended = False

    def output_tangents(
        self, jvp: JvpFn, inputs: Sequence[TangentRef], outputs: Sequence[Tensor]
    ) -> Sequence[TangentRef]:
        if self.ended:
            return [None] * len(outputs)
        with torch.no_grad():
            return listed(jvp(_identity))


class LinearizedRecord:
    """For tangents of the inputs that are not known yet: it keeps the `jvp` of each operation.

    `new_tangent` gives the number of each input's tangent, and `replay` later computes one tangent
    from those of the inputs.

    `finished` moves what was kept into another record, because of activation checkpointing: its
    blocks hold their inputs, the inputs hold this record, and a `jvp` holds primals, whose graph
    holds the blocks. That circle would keep all of it in memory.
    """

    def __init__(self, rule_of: Callable[[Any], JvpRule]):
        self.rule_of = rule_of
        self._count = 0
        self._operations: list[tuple[JvpFn, Sequence[int], Sequence[int]]] | None = []

    def new_tangent(self) -> int:
        self._count += 1
        return self._count - 1

    def output_tangents(
        self, jvp: JvpFn, inputs: Sequence[TangentRef], outputs: Sequence[Tensor]
    ) -> Sequence[TangentRef]:
        if self._operations is None:  # activation checkpointing computes a block again
            return [None] * len(outputs)
        numbers = [self.new_tangent() for _ in outputs]
        self._operations.append((jvp, inputs, numbers))
        return numbers

    def finished(self) -> LinearizedRecord:
        """A record with the operations so far; this one gives no more tangents."""
        other = LinearizedRecord(self.rule_of)
        other._operations, self._operations = self._operations, None
        return other

    def replay(self, tangents: Sequence[Tensor], wanted: int) -> Tensor:
        """The tangent number `wanted`, given those of the inputs, in the order of their numbers.

        It can be called once, since it releases the primals as it goes.
        """
        operations, self._operations = self._needed_for(wanted), None
        uses = Counter(number for _, inputs, _ in operations for number in inputs)
        uses[wanted] += 1
        known = dict(enumerate(tangents))
        operations.reverse()
        with torch.no_grad():
            while operations:
                jvp, inputs, outputs = operations.pop()  # which releases the primals that it holds
                known |= zip(outputs, listed(jvp(known.__getitem__)), strict=True)
                uses.subtract(inputs)
                for number in (*inputs, *outputs):
                    if not uses[number]:
                        known.pop(number, None)
        return known[wanted]

    def _needed_for(self, wanted: int) -> list[tuple[JvpFn, Sequence[int], Sequence[int]]]:
        """The operations that the tangent `wanted` depends on, in their order."""
        if self._operations is None:
            raise RuntimeError(
                "one_pass gives the derivative of a forward pass once, and has given this one; "
                "run the forward pass again"
            )
        needed, useful = {wanted}, []
        for operation in reversed(self._operations):
            _, inputs, outputs = operation
            if needed.intersection(outputs):
                needed.update(inputs)
                useful.append(operation)
        return useful[::-1]


def unwrapped(x: Any) -> Any:
    """The primal of a `DualTensor` argument; any other argument as it is."""
    return x.primal if type(x) is DualTensor else x


def primal_of(x: Tensor) -> Tensor:
    """The primal of a network's output; NotImplementedError if it cannot be followed."""
    if type(x) is not DualTensor:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        check_no_function(x)
        check_unchanged("the output", x.primal, x.version)
        return x.primal


def can_have_tangent(x: Any) -> bool:
    """Whether x is a tensor of real or complex numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def dual_tensors_among(arguments: Iterable[Any]) -> list[DualTensor]:
    """The dual tensors among arguments, and in lists and tuples among them."""
    found = []
    for argument in arguments:
        if type(argument) is DualTensor:
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += dual_tensors_among(argument)
    return found


def _with_tangents(out: Any, jvp: JvpFn, record: TangentRecord, given: Sequence[DualTensor]) -> Any:
    inputs = [one.tangent for one in given]
    if isinstance(out, Tensor):
        if not can_have_tangent(out):
            return out
        return _with_tangent(out, record.output_tangents(jvp, inputs, [out])[0], record)
    flat, spec = pytree.tree_flatten(out)
    refs = record.output_tangents(jvp, inputs, flat)
    made = [_with_tangent(one, ref, record) for one, ref in zip(flat, refs, strict=True)]
    return pytree.tree_unflatten(made, spec)


def _with_tangent(value: Any, ref: TangentRef, record: TangentRecord) -> Any:
    if ref is None or not can_have_tangent(value):
        return value
    return DualTensor(value, ref, record)


def listed(tangents: Any) -> Sequence[Any]:
    return [tangents] if tangents is None or isinstance(tangents, Tensor) else list(tangents)


def _identity(ref: TangentRef) -> Tensor:
    tangent: Tensor = ref
    return tangent
