"""How the outputs of a function move with its inputs, for zoo/lifted.py.

A rule calls the function on values and gives, with the outcome, how it moves: a function of the
inputs' tangents that computes in as few passes over memory as it can. What no rule names is done
again on dual numbers, without gradient, so every function with a forward-mode rule in torch will
do; those here are what networks spend their time on.

Activations work element by element and normalisations have symmetric Jacobians, so the kernels of
their backward passes give their tangents. Attention o = P v, P = softmax(s), moves by

    do = dP v + P dv,    dP = P (ds - sum_j P ds)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from zoo.lifted import REMEDY, Lifted, Push, Rule, Slot, lifted_among, value_of

Outcome = tuple[Any, Push | None]
Move = Callable[[Slot], Tensor]

aten = torch.ops.aten


def rule_of(func: Any) -> Rule:
    """By dual numbers unless it has a rule of its own."""
    return RULES.get(func, by_dual_numbers)


def by_dual_numbers(func: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Any function of torch that writes into none of its arguments, done again."""
    name = getattr(func, "__name__", str(func))
    named_so = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if named_so or kwargs.get("inplace") or kwargs.get("out") is not None:
        raise NotImplementedError(f"one_pass cannot follow {name}, which writes in place; {REMEDY}")
    if func in RANDOM:
        raise NotImplementedError(f"one_pass cannot follow {name}, which draws anew; {REMEDY}")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values, slots = [value_of(leaf) for leaf in leaves], [_slot(leaf) for leaf in leaves]
    given_args, given_kwargs = pytree.tree_unflatten(values, spec)
    out = func(*given_args, **given_kwargs)
    if not any(_moves(part) for part in pytree.tree_leaves(out)):
        return out, None

    def push(move: Move) -> Any:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            duals = [
                value if slot is None else forward_ad.make_dual(value.detach(), move(slot))
                for value, slot in zip(values, slots, strict=True)
            ]
            again_args, again_kwargs = pytree.tree_unflatten(duals, spec)
            again = pytree.tree_leaves(func(*again_args, **again_kwargs))
            return [_tangent(part) if _moves(part) else None for part in again]

    return out, push


def constant(func: Any, *args: Any, **kwargs: Any) -> Outcome:
    """What tells of a tensor no more than its shape and kind, or cuts it off."""
    return func(*map(value_of, args), **kwargs), None


def linear_in_first(func: Any, x: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Views, casts and the like."""
    if type(x) is not Lifted or _any_lifted((*args, *kwargs.values())):
        return by_dual_numbers(func, x, *args, **kwargs)
    slot = x.slot
    return func(x.value, *args, **kwargs), lambda move: func(move(slot), *args, **kwargs)


def as_other(func: Any, x: Any, other: Any) -> Outcome:
    """Views and casts to the shape or the kind of another tensor."""
    model = value_of(other).detach()
    if type(x) is not Lifted:
        return func(x, model), None
    slot = x.slot
    return func(x.value, model), lambda move: func(move(slot), model)


def layer(
    func: Any, input: Any, weight: Any, bias: Any = None, *rest: Any, **named: Any
) -> Outcome:
    """Linear layers and convolutions: linear in their input but for the bias."""
    if type(input) is not Lifted or _any_lifted((weight, bias)):
        return by_dual_numbers(func, input, weight, bias, *rest, **named)
    slot = input.slot
    out = func(input.value, weight, bias, *rest, **named)
    return out, lambda move: func(move(slot), weight, None, *rest, **named)


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


def summed(signs: tuple[int, int], func: Any, a: Any, b: Any, **kwargs: Any) -> Outcome:
    """a + b and a - b; one that does not move drops out."""
    if kwargs:
        return by_dual_numbers(func, a, b, **kwargs)
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


def product(func: Any, a: Any, b: Any, **kwargs: Any) -> Outcome:
    """Of any kind that is linear in each of two factors."""
    if kwargs:
        return by_dual_numbers(func, a, b, **kwargs)
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


def quotient(func: Any, a: Any, b: Any, **kwargs: Any) -> Outcome:
    if type(b) is Lifted or kwargs:
        return by_dual_numbers(func, a, b, **kwargs)
    slot = a.slot
    return func(a.value, b), lambda move: func(move(slot), b)


def activation(backward: Any, func: Any, input: Any, *args: Any, **kwargs: Any) -> Outcome:
    """Element by element, with the kernel of its backward."""
    if args or kwargs.pop("inplace", False):
        return by_dual_numbers(func, input, *args, inplace=True)
    value, slot = input.value, input.slot
    out = func(value, **kwargs)
    return out, lambda move: backward(move(slot), value, **kwargs)


def dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Outcome:
    """The same mask on the value and its tangent."""
    if inplace:
        return by_dual_numbers(func, input, p, training, inplace=True)
    if not training or p == 0:
        return input, None
    slot = input.slot
    out, mask = torch.native_dropout(input.value, p, True)
    return out, lambda move: move(slot) * mask / (1 - p)


def layer_norm(
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Outcome:
    if not _alike(input, weight, bias):
        return by_dual_numbers(func, input, normalized_shape, weight, bias, eps)
    value, slot, shape = input.value, input.slot, list(normalized_shape)
    out, mean, rstd = torch.native_layer_norm(value, shape, weight, bias, eps)

    def push(move: Move) -> Tensor:
        moved: Tensor = aten.native_layer_norm_backward(
            move(slot), value, shape, mean, rstd, None, None, (True, False, False)
        )[0]
        return moved if weight is None else moved * weight

    return out, push


def group_norm(
    func: Any,
    input: Any,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Outcome:
    if not _alike(input, weight, bias):
        return by_dual_numbers(func, input, num_groups, weight, bias, eps)
    value, slot = input.value.contiguous(), input.slot
    sizes = len(value), value.shape[1], math.prod(value.shape[2:]), num_groups
    out, mean, rstd = torch.native_group_norm(value, weight, bias, *sizes, eps)

    def push(move: Move) -> Tensor:
        return group_norm_tangent(move(slot), value, mean, rstd, weight, sizes)

    return out, push


def group_norm_tangent(
    tangent: Tensor,
    value: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    sizes: tuple[int, int, int, int],
) -> Tensor:
    """Of a contiguous value [b c *d] with `sizes` b, c, the product of d, and groups."""
    moved: Tensor = aten.native_group_norm_backward(
        tangent.contiguous(), value, mean, rstd, None, *sizes, (True, False, False)
    )[0]
    return moved if weight is None else weight.view(-1, *[1] * (value.ndim - 2)) * moved


def rms_norm(
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Outcome:
    if not _alike(input, weight):
        return by_dual_numbers(func, input, normalized_shape, weight, eps)
    value, slot = input.value, input.slot
    axes = tuple(range(-len(normalized_shape), 0))
    least = torch.finfo(value.dtype).eps if eps is None else eps

    def push(move: Move) -> Tensor:
        tangent = move(slot)
        scale = (value.square().mean(axes, keepdim=True) + least).rsqrt()
        along = (value * tangent).mean(axes, keepdim=True) * scale.square()
        moved = scale * torch.addcmul(tangent, value, along, value=-1)
        return moved if weight is None else moved * weight

    return func(value, normalized_shape, weight, eps), push


def attention(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> Outcome:
    """The kernel of an ordinary pass for the value; matrices of tokens for the tangent alone."""
    named = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, **kwargs)
    if dropout_p:
        raise NotImplementedError(f"one_pass cannot follow dropout within attention; {REMEDY}")
    moving = all(type(x) is Lifted for x in (query, key, value))
    if not moving or attn_mask is not None or is_causal or kwargs:
        return by_dual_numbers(func, query, key, value, **named)
    (q, k, v), slots = ([getattr(x, n) for x in (query, key, value)] for n in ("value", "slot"))
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def push(move: Move) -> Tensor:
        dq, dk, dv = map(move, slots)
        scaled = q * factor
        weights = (scaled @ k.mT).softmax(-1)
        moved = weights * (dq * factor @ k.mT + scaled @ dk.mT)
        moved = torch.addcmul(moved, weights, moved.sum(-1, keepdim=True), value=-1)
        return moved @ v + weights @ dv

    return func(q, k, v, scale=scale), push


def _any_lifted(parts: Iterable[Any]) -> bool:
    return bool(lifted_among(parts))


def _slot(x: Any) -> Slot | None:
    return x.slot if type(x) is Lifted else None


def _tangent(dual: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(dual).tangent
    return torch.zeros_like(dual) if tangent is None else tangent


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _alike(input: Any, *parameters: Any) -> bool:
    """Whether a fused kernel may take these: parameters that stand still, no casts of autocast."""
    return (
        type(input) is Lifted
        and not _any_lifted(parameters)
        and all(p is None or p.dtype == input.value.dtype for p in parameters)
        and not torch.is_autocast_enabled(input.value.device.type)
    )


def _methods(*names: str) -> list[Any]:
    return [getattr(Tensor, name) for name in names]


PRODUCTS = {torch.mul, *_methods("mul", "__mul__", "__rmul__")}
IN_PLACE = {
    f"__{name}__"
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem")
}
RANDOM = {
    F.alpha_dropout,
    F.feature_alpha_dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.rrelu,
}
READ = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "data")
CONSTANT = (
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(torch.rand_like, torch.randn_like, torch.detach),
)
CONSTANTS = (
    *("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "detach"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
)
VIEWS = (
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze"),
    *("squeeze", "chunk", "split", "unbind", "expand", "contiguous", "clone", "to", "float"),
    *("movedim", "swapaxes", "narrow", "select", "mean", "sum", "neg", "roll", "flip"),
)
LAYERS = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)
RULES: dict[Any, Rule] = {
    **{getattr(Tensor, name).__get__: constant for name in READ},
    **dict.fromkeys((*CONSTANT, *_methods(*CONSTANTS)), constant),
    **dict.fromkeys(_methods(*VIEWS, "__getitem__", "__neg__"), linear_in_first),
    **dict.fromkeys(_methods("type_as", "view_as", "expand_as", "reshape_as"), as_other),
    **{getattr(torch, n): linear_in_first for n in VIEWS if callable(getattr(torch, n, None))},
    **dict.fromkeys((F.interpolate, F.avg_pool2d, F.pixel_shuffle), linear_in_first),
    **dict.fromkeys(LAYERS, layer),
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), joined),
    **dict.fromkeys((torch.add, *_methods("add", "__add__", "__radd__")), partial(summed, (1, 1))),
    **dict.fromkeys((torch.sub, *_methods("sub", "__sub__")), partial(summed, (1, -1))),
    Tensor.__rsub__: partial(summed, (-1, 1)),
    **dict.fromkeys(PRODUCTS, product),
    **dict.fromkeys((torch.matmul, torch.bmm, *_methods("matmul", "bmm", "__matmul__")), product),
    **dict.fromkeys((torch.div, *_methods("div", "__truediv__")), quotient),
    F.gelu: partial(activation, aten.gelu_backward),
    F.silu: partial(activation, aten.silu_backward),
    F.dropout: dropout,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.rms_norm: rms_norm,
    F.scaled_dot_product_attention: attention,
}
