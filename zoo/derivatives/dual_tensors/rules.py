"""Rules for elementary functions: the value of a function, and the tangent of that value.

A rule calls the function on primals and returns its outputs with a `jvp`, which computes the
outputs' tangents from the inputs' in as few passes over memory as it can. A function without a rule
is called again on torch's dual numbers, without gradient, so every function that torch can
differentiate in forward mode works. The rules here and in layers.py are for the functions on which
networks spend their time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from zoo.derivatives.dual_tensors.refusals import BY_DIFFERENCES, BY_DUAL, name_of, refuse
from zoo.derivatives.dual_tensors.tensor import (
    DualTensor,
    Resolve,
    RuleOutput,
    TangentRef,
    can_have_tangent,
    dual_tensors_among,
    unwrapped,
)

PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}


def by_dual_numbers(func: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """The rule of a function that has no other: its `jvp` calls it again on torch's dual numbers.

    NotImplementedError if the function draws random numbers, or if torch loses its tangents.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values, refs = [unwrapped(leaf) for leaf in leaves], [_tangent_ref(leaf) for leaf in leaves]
    given_args, given_kwargs = pytree.tree_unflatten(values, spec)
    beside = next(leaf.primal for leaf in leaves if type(leaf) is DualTensor)
    before = _random_state(beside)
    out = func(*given_args, **given_kwargs)
    if not any(can_have_tangent(part) for part in pytree.tree_leaves(out)):
        return out, None
    if kwargs.get("generator") is not None or _random_state(beside) != before:
        refuse(f"{name_of(func)}, which draws anew", BY_DUAL)

    def jvp(resolve: Resolve) -> Any:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = [
                value if ref is None else forward_ad.make_dual(value.detach(), resolve(ref))
                for value, ref in zip(values, refs, strict=True)
            ]
            again_args, again_kwargs = pytree.tree_unflatten(duals, spec)
            try:
                again = pytree.tree_leaves(func(*again_args, **again_kwargs))
            except NotImplementedError:
                refuse(f"{name_of(func)}, for which torch has no forward-mode rule", BY_DIFFERENCES)
            tangents = [_tangent(part) for part in again]
            if all(tangent is None for tangent in tangents):
                refuse(
                    f"{name_of(func)}, which loses the tangents of dual numbers: it has no "
                    "forward-mode rule, or it runs inside an autograd.Function, such as reentrant "
                    "activation checkpointing",
                    BY_DIFFERENCES,
                )
            return [
                torch.zeros_like(part) if tangent is None and can_have_tangent(part) else tangent
                for part, tangent in zip(again, tangents, strict=True)
            ]

    return out, jvp


def constant(func: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """Functions whose output has no tangent: they read a tensor's shape, kind or bare values."""
    named = {name: unwrapped(arg) for name, arg in kwargs.items()}
    return func(*map(unwrapped, args), **named), None


def data(func: Any, x: Any) -> RuleOutput:
    """x.data as x.detach(): it counts the changes in place, which are then refused."""
    return x.primal.detach(), None


def linear_in_first(func: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """Functions that are linear in their first argument, such as views, casts and sums."""
    x, rest = args[0] if args else None, args[1:]
    if type(x) is not DualTensor or any_dual((*rest, *kwargs.values())):
        return by_dual_numbers(func, *args, **kwargs)
    ref = x.tangent
    return func(x.primal, *rest, **kwargs), lambda resolve: func(resolve(ref), *rest, **kwargs)


def view(func: Any, x: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """Views by shape. A tangent's strides may differ from its primal's, so it is reshaped."""
    if type(x) is not DualTensor:
        return func(x, *map(unwrapped, args)), None
    out, ref = func(x.primal, *map(unwrapped, args), **kwargs), x.tangent
    if out.dtype != x.primal.dtype:
        return by_dual_numbers(func, x, *args, **kwargs)
    shape = out.shape
    return out, lambda resolve: resolve(ref).reshape(shape)


def like_another(func: Any, x: Any, other: Any) -> RuleOutput:
    """Casts and reshapes to the dtype or the shape of another tensor."""
    model = unwrapped(other).detach()
    if type(x) is not DualTensor:
        return func(x, model), None
    ref = x.tangent
    return func(x.primal, model), lambda resolve: func(resolve(ref), model)


def concatenation(func: Any, tensors: Sequence[Any], *args: Any, **kwargs: Any) -> RuleOutput:
    """cat and stack; a tensor without a tangent contributes zeros."""
    values, refs = [unwrapped(x) for x in tensors], [_tangent_ref(x) for x in tensors]
    constants = [torch.zeros_like(x) for x, ref in zip(values, refs, strict=True) if ref is None]

    def jvp(resolve: Resolve) -> Tensor:
        zeros = iter(constants)
        tangents = [next(zeros) if ref is None else resolve(ref) for ref in refs]
        joint: Tensor = func(tangents, *args, **kwargs)
        return joint

    return func(values, *args, **kwargs), jvp


def signed_sum(signs: tuple[int, int], func: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """a + b and a - b, with the signs of a and b; a term without a tangent adds nothing."""
    if len(args) != 2 or kwargs:
        return by_dual_numbers(func, *args, **kwargs)
    a, b = args
    out, ref_a, ref_b = func(unwrapped(a), unwrapped(b)), _tangent_ref(a), _tangent_ref(b)
    shape, dtype = out.shape, out.dtype

    def jvp(resolve: Resolve) -> Tensor:
        if ref_a is not None and ref_b is not None:
            both: Tensor = func(resolve(ref_a), resolve(ref_b))
            return both
        one, sign = (resolve(ref_a), signs[0]) if ref_b is None else (resolve(ref_b), signs[1])
        one = one.to(dtype).expand(shape)
        return one if sign > 0 else -one

    return out, jvp


def product(func: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """Products of every kind: functions that are linear in each of two arguments."""
    if len(args) != 2 or kwargs:
        return by_dual_numbers(func, *args, **kwargs)
    a, b = args
    (x, y), (ref_x, ref_y) = (unwrapped(a), unwrapped(b)), (_tangent_ref(a), _tangent_ref(b))
    out = func(x, y)

    def jvp(resolve: Resolve) -> Tensor:
        if ref_x is None or ref_y is None:
            one: Tensor = func(x, resolve(ref_y)) if ref_x is None else func(resolve(ref_x), y)
            return one
        if func in PRODUCTS and x.dtype == y.dtype == out_dtype:
            return torch.addcmul(resolve(ref_x) * y, x, resolve(ref_y))
        return func(resolve(ref_x), y) + func(x, resolve(ref_y))

    out_dtype = out.dtype
    return out, jvp


def quotient(func: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """Division by a constant; other divisions use dual numbers."""
    if len(args) != 2 or kwargs or type(args[1]) is DualTensor:
        return by_dual_numbers(func, *args, **kwargs)
    a, b = args
    ref = a.tangent
    return func(a.primal, b), lambda resolve: func(resolve(ref), b)


def any_dual(arguments: Iterable[Any]) -> bool:
    return bool(dual_tensors_among(arguments))


def _tangent_ref(x: Any) -> TangentRef | None:
    return x.tangent if type(x) is DualTensor else None


def _random_state(beside: Tensor) -> bytes:
    """The state of the global generator on this tensor's device.

    It is empty for tensors without data, for which nothing is drawn.
    """
    if type(beside) is not Tensor:
        return b""
    device = beside.device
    if device.type == "cpu":
        state = torch.get_rng_state()
    else:
        state = torch.get_device_module(device).get_rng_state(device)
    return state.numpy().tobytes()


def _tangent(dual: Any) -> Tensor | None:
    tangent = forward_ad.unpack_dual(dual).tangent if can_have_tangent(dual) else None
    # In mixed precision some of torch's rules give a tangent of another dtype than the value's.
    return None if tangent is None else tangent.to(dual.dtype)
