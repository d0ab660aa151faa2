"""How the outputs of elementary functions move with their inputs.

A rule calls the function on values and gives, with the outcome, how it moves: a function of the
inputs' tangents that computes in as few passes over memory as it can. What no rule names is done
again on dual numbers, without gradient, so every function with a forward-mode rule in torch will
do; those here and in layers.py are what networks spend their time on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from zoo.derivatives.dual_tensors.tensor import (
    REMEDY,
    Lifted,
    Push,
    Slot,
    lifted_among,
    moves,
    name_of,
    value_of,
)

Outcome = tuple[Any, Push | None]
Move = Callable[[Slot], Tensor]

PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


def by_dual_numbers(func: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Any function with a forward-mode rule in torch, done again."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values, slots = [value_of(leaf) for leaf in leaves], [_slot(leaf) for leaf in leaves]
    given_args, given_kwargs = pytree.tree_unflatten(values, spec)
    beside = next(leaf.value for leaf in leaves if type(leaf) is Lifted)
    before = _random_state(beside)
    out = func(*given_args, **given_kwargs)
    if not any(moves(part) for part in pytree.tree_leaves(out)):
        return out, None
    if kwargs.get("generator") is not None or _random_state(beside) != before:
        name = name_of(func)
        raise NotImplementedError(f"one_pass cannot follow {name}, which draws anew; {REMEDY}")

    def push(move: Move) -> Any:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = [
                value if slot is None else forward_ad.make_dual(value.detach(), move(slot))
                for value, slot in zip(values, slots, strict=True)
            ]
            again_args, again_kwargs = pytree.tree_unflatten(duals, spec)
            again = pytree.tree_leaves(func(*again_args, **again_kwargs))
            tangents = [_tangent(part) for part in again]
            if all(tangent is None for tangent in tangents):
                raise NotImplementedError(
                    f"one_pass cannot follow {name_of(func)}, which loses the tangents of dual "
                    "numbers; choose @finite_difference()"
                )
            return [
                torch.zeros_like(part) if tangent is None and moves(part) else tangent
                for part, tangent in zip(again, tangents, strict=True)
            ]

    return out, push


def constant(func: Any, *args: Any, **kwargs: Any) -> Outcome:
    """What tells of a tensor no more than its shape and kind, or cuts it off."""
    named = {name: value_of(arg) for name, arg in kwargs.items()}
    return func(*map(value_of, args), **named), None


def linear_in_first(func: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Views, casts and the like."""
    x, rest = args[0] if args else None, args[1:]
    if type(x) is not Lifted or any_lifted((*rest, *kwargs.values())):
        return by_dual_numbers(func, *args, **kwargs)
    slot = x.slot
    return func(x.value, *rest, **kwargs), lambda move: func(move(slot), *rest, **kwargs)


def viewed(func: Any, x: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Views by shape; a tangent may lie otherwise in memory than its value."""
    if type(x) is not Lifted:
        return func(x, *map(value_of, args)), None
    out, slot = func(x.value, *map(value_of, args), **kwargs), x.slot
    if out.dtype != x.value.dtype:
        return by_dual_numbers(func, x, *args, **kwargs)
    shape = out.shape
    return out, lambda move: move(slot).reshape(shape)


def as_other(func: Any, x: Any, other: Any) -> Outcome:
    """Casts and reshapes to the kind or the shape of another tensor."""
    model = value_of(other).detach()
    if type(x) is not Lifted:
        return func(x, model), None
    slot = x.slot
    return func(x.value, model), lambda move: func(move(slot), model)


def joined(func: Any, tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Outcome:
    """cat and stack; what does not move joins as zeros."""
    values, slots = [value_of(x) for x in tensors], [_slot(x) for x in tensors]
    still = [torch.zeros_like(x) for x, slot in zip(values, slots, strict=True) if slot is None]

    def push(move: Move) -> Tensor:
        zeros = iter(still)
        parts = [next(zeros) if slot is None else move(slot) for slot in slots]
        joint: Tensor = func(parts, *args, **kwargs)
        return joint

    return func(values, *args, **kwargs), push


def summed(signs: tuple[int, int], func: Any, *args: Any, **kwargs: Any) -> Outcome:
    """a + b and a - b; one that does not move drops out."""
    if len(args) != 2 or kwargs:
        return by_dual_numbers(func, *args, **kwargs)
    a, b = args
    out, i, j = func(value_of(a), value_of(b)), _slot(a), _slot(b)
    shape, dtype = out.shape, out.dtype

    def push(move: Move) -> Tensor:
        if i is not None and j is not None:
            moved: Tensor = func(move(i), move(j))
            return moved
        one, sign = (move(i), signs[0]) if j is None else (move(j), signs[1])
        one = one.to(dtype).expand(shape)
        return one if sign > 0 else -one

    return out, push


def product(func: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Of any kind that is linear in each of two factors."""
    if len(args) != 2 or kwargs:
        return by_dual_numbers(func, *args, **kwargs)
    a, b = args
    (x, y), (i, j) = (value_of(a), value_of(b)), (_slot(a), _slot(b))
    out = func(x, y)

    def push(move: Move) -> Tensor:
        if i is None or j is None:
            moved: Tensor = func(x, move(j)) if i is None else func(move(i), y)
            return moved
        if func in PRODUCTS and x.dtype == y.dtype == out_dtype:
            return torch.addcmul(move(i) * y, x, move(j))
        return func(move(i), y) + func(x, move(j))

    out_dtype = out.dtype
    return out, push


def quotient(func: Any, *args: Any, **kwargs: Any) -> Outcome:
    if len(args) != 2 or kwargs or type(args[1]) is Lifted:
        return by_dual_numbers(func, *args, **kwargs)
    a, b = args
    slot = a.slot
    return func(a.value, b), lambda move: func(move(slot), b)


def any_lifted(parts: Iterable[Any]) -> bool:
    return bool(lifted_among(parts))


def _slot(x: Any) -> Slot | None:
    return x.slot if type(x) is Lifted else None


def _random_state(beside: Tensor) -> bytes:
    """Of the global generator there; none beside tensors without data, which draw nothing."""
    if type(beside) is not Tensor:
        return b""
    device = beside.device
    if device.type == "cpu":
        state = torch.get_rng_state()
    else:
        state = torch.get_device_module(device).get_rng_state(device)
    return state.numpy().tobytes()


def _tangent(dual: Any) -> Tensor | None:
    tangent = forward_ad.unpack_dual(dual).tangent if moves(dual) else None
    # Rules of torch for mixed precision give tangents of another kind than the value's.
    return None if tangent is None else tangent.to(dual.dtype)
