"""Tensors that know how they move: forward mode inside an ordinary forward.

A `Lifted` stands for a value and, beside it, for the value's derivative along tangents of the
inputs. What a network does to it is done to the value as ever: by the same kernels, with the graph
that its gradient needs. The derivative follows by rules (rules.py, layers.py) that read values and
keep no graph. So one forward gives both, where dual numbers of torch take a second forward, or a
graph of the derivative and no fused attention.

The tangents of the inputs may be known before the pass (`Flowing`), or only after it, because they
are made of what the pass gives (`Tape`).

Nothing is lost in silence: an autograd.Function or compiled code, which get hold of a `Lifted`
behind the rules, end in an error that says so. A .detach() cuts as it cuts dual numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

Slot = Any  # a tangent, or its number on a tape
Push = Callable[[Callable[[Slot], Tensor]], Any]  # by the inputs' tangents, those of the outputs
Rule = Callable[..., tuple[Any, Push | None]]  # None: nothing here moves

IN_PLACE = {
    f"__{name}__"
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem", "set")
}
REMEDY = "choose @dual(), whose derivative takes a pass of its own"


class Record(Protocol):
    """What rules there are, and what becomes of those that move the outputs of operations."""

    rule_of: Callable[[Any], Rule]

    def slots(self, push: Push, parents: Sequence[Slot], out: Sequence[Tensor]) -> Sequence[Slot]:
        """A slot for each of `out`; None for what does not move."""
        ...


def _refuse_gradient(gradient: Tensor) -> NoReturn:
    raise NotImplementedError(
        f"one_pass cannot follow an autograd.Function that gives a tensor without tangent; {REMEDY}"
    )


# What such a Function gives bears no mark, but its gradient would end here and not at the value.
GUARD: dict[int, Callable[[Tensor], Tensor | None]] = {0: _refuse_gradient}


class Lifted(Tensor):
    """`value`, with its graph, and the `slot` of its tangent in a `record`."""

    value: Tensor
    slot: Slot
    record: Record

    @staticmethod
    def __new__(cls, value: Tensor, slot: Slot, record: Record) -> Lifted:
        # The outer tensor has no data. It asks for a gradient where the value has one, so that an
        # autograd.Function, which sees the outer tensor alone, leaves its mark on what it gives.
        lifted: Lifted = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            dtype=value.dtype,
            device=value.device,
            requires_grad=value.requires_grad,
        )
        if value.requires_grad:
            lifted._backward_hooks = GUARD
        lifted.value, lifted.slot, lifted.record = value, slot, record
        return lifted

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
            given = lifted_among((*args, *kwargs.values()) if kwargs else args)
            for one in given:
                _check_followed(one)
            _check_writes_nowhere(func, kwargs)
            record = given[0].record
            out, push = record.rule_of(func)(func, *args, **kwargs)
            return out if push is None else _lifted(out, push, record, given)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise NotImplementedError(f"one_pass cannot follow {func} into compiled code; {REMEDY}")


class Flowing:
    """The tangents of the inputs are known, and every operation moves its outputs at once.

    Until the pass has `ended`: blocks that checkpointing computes again do without tangents.
    """

    def __init__(self, rule_of: Callable[[Any], Rule]):
        self.rule_of = rule_of
        self.ended = False

    def slots(self, push: Push, parents: Sequence[Slot], out: Sequence[Tensor]) -> Sequence[Slot]:
        if self.ended:
            return [None] * len(out)
        with torch.no_grad():
            return _listed(push(_itself))


class Tape:
    """The rules are kept, in the order of the operations, until the inputs' tangents are known.

    They leave the tape of a pass when it ends: blocks under checkpointing hold their inputs, those
    hold the tape of the pass, and rules hold values, whose graph holds the blocks.
    """

    def __init__(self, rule_of: Callable[[Any], Rule]):
        self.rule_of = rule_of
        self._count = 0
        self._rules: list[tuple[Push, Sequence[int], Sequence[int]]] | None = []

    def slot(self) -> int:
        self._count += 1
        return self._count - 1

    def slots(self, push: Push, parents: Sequence[Slot], out: Sequence[Tensor]) -> Sequence[Slot]:
        if self._rules is None:  # a block under checkpointing is computed again
            return [None] * len(out)
        slots = [self.slot() for _ in out]
        self._rules.append((push, parents, slots))
        return slots

    def taken(self) -> Tape:
        """A tape with the rules so far; this one keeps no more of them."""
        other = Tape(self.rule_of)
        other._rules, self._rules = self._rules, None
        return other

    def replay(self, tangents: Sequence[Tensor], wanted: int) -> Tensor:
        """The tangent of the slot `wanted`, by those of the slots that were taken first. Once."""
        rules, self._rules = self._useful(wanted), None
        uses = Counter(slot for _, parents, _ in rules for slot in parents)
        uses[wanted] += 1
        moved = dict(enumerate(tangents))
        rules.reverse()
        with torch.no_grad():
            while rules:
                push, parents, slots = rules.pop()  # and let go of the values that it holds
                moved |= zip(slots, _listed(push(moved.__getitem__)), strict=True)
                uses.subtract(parents)
                for slot in (*parents, *slots):
                    if not uses[slot]:
                        moved.pop(slot, None)
        return moved[wanted]

    def _useful(self, wanted: int) -> list[tuple[Push, Sequence[int], Sequence[int]]]:
        """The rules that `wanted` depends on, in their order."""
        if self._rules is None:
            raise RuntimeError("one_pass gives the derivative of a forward once, and has given it")
        needed, useful = {wanted}, []
        for rule in reversed(self._rules):
            _, parents, slots = rule
            if needed.intersection(slots):
                needed.update(parents)
                useful.append(rule)
        return useful[::-1]


def value_of(x: Any) -> Any:
    """The value of a `Lifted`; anything else as it is."""
    return x.value if type(x) is Lifted else x


def settled(x: Tensor) -> Tensor:
    """The value of what a network gave."""
    if type(x) is not Lifted:
        return x
    with torch._C.DisableTorchFunctionSubclass():
        _check_followed(x)
        return x.value


def name_of(func: Any) -> str:
    return str(func) if isinstance(func, OpOverload) else getattr(func, "__name__", str(func))


def moves(x: Any) -> bool:
    """Whether it is of a kind that may have a tangent: real and complex numbers."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def lifted_among(parts: Iterable[Any]) -> list[Lifted]:
    """Those among arguments, and in their lists."""
    found = []
    for part in parts:
        if type(part) is Lifted:
            found.append(part)
        elif isinstance(part, (list, tuple)):
            found += lifted_among(part)
    return found


def _check_followed(one: Lifted) -> None:
    if one.grad_fn is not None:
        raise NotImplementedError(
            f"one_pass cannot follow {one.grad_fn.name()}, an autograd.Function; {REMEDY}"
        )


def _check_writes_nowhere(func: Any, kwargs: Mapping[str, Any]) -> None:
    if _writes(func) or kwargs.get("inplace") or kwargs.get("out") is not None:
        raise NotImplementedError(
            f"one_pass cannot follow {name_of(func)}, which writes in place; {REMEDY}"
        )


@cache
def _writes(func: Any) -> bool:
    if isinstance(func, OpOverload):
        return bool(func._schema.is_mutable)
    name = name_of(func)
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _lifted(out: Any, push: Push, record: Record, given: Sequence[Lifted]) -> Any:
    parents = [one.slot for one in given]
    if isinstance(out, Tensor):
        if not moves(out):
            return out
        return _with_slot(out, record.slots(push, parents, [out])[0], record)
    flat, spec = pytree.tree_flatten(out)
    slots = record.slots(push, parents, flat)
    moving = [_with_slot(one, slot, record) for one, slot in zip(flat, slots, strict=True)]
    return pytree.tree_unflatten(moving, spec)


def _with_slot(value: Any, slot: Slot, record: Record) -> Any:
    return Lifted(value, slot, record) if slot is not None and moves(value) else value


def _listed(tangents: Any) -> Sequence[Any]:
    return [tangents] if tangents is None or isinstance(tangents, Tensor) else list(tangents)


def _itself(tangent: Slot) -> Tensor:
    found: Tensor = tangent
    return found
