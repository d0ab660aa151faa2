"""How layers move: linear ones, activations, dropout, norms and attention.

Activations work element by element and normalisations have symmetric Jacobians, so the kernels of
their backward passes give their tangents. Attention o = P v, P = softmax(s), moves by

    do = dP v + P dv,    dP = P (ds - sum_j P ds)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.derivatives.dual_tensors.rules import Move, Outcome, any_lifted, by_dual_numbers
from zoo.derivatives.dual_tensors.tensor import REMEDY, Lifted, value_of

aten = torch.ops.aten


def layer(
    func: Any, input: Any, weight: Any, bias: Any = None, *rest: Any, **named: Any
) -> Outcome:
    """Linear layers and convolutions: linear in their input but for the bias."""
    if type(input) is not Lifted or any_lifted((weight, bias)):
        return by_dual_numbers(func, input, weight, bias, *rest, **named)
    slot = input.slot
    out = func(input.value, weight, bias, *rest, **named)
    return out, lambda move: func(move(slot), weight, None, *rest, **named)


def activation(backward: Any, func: Any, input: Any, **kwargs: Any) -> Outcome:
    """Element by element, with the kernel of its backward."""
    kwargs.pop("inplace", None)
    value, slot = input.value, input.slot
    out = func(value, **kwargs)
    return out, lambda move: backward(move(slot), value, **kwargs)


def dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Outcome:
    """The same mask on the value and its tangent."""
    if not training or p == 0:
        return input, None
    value, slot = input.value, input.slot
    if value.is_cuda and p < 1:
        out, mask = torch.native_dropout(value, p, True)
        return out, lambda move: move(slot) * mask / (1 - p)
    noise = func(torch.ones_like(value), p)  # as the kernels of other devices do, to the bit
    return value * noise, lambda move: move(slot) * noise


def layer_norm(
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Outcome:
    if not _moves_alone(input, weight, bias):
        return by_dual_numbers(func, input, normalized_shape, weight, bias, eps)
    value, slot, shape = input.value, input.slot, list(normalized_shape)
    statistics: Sequence[Tensor] = ()
    if _fused(value, weight, bias):
        out, *statistics = torch.native_layer_norm(value, shape, weight, bias, eps)
    else:
        out = func(value, shape, weight, bias, eps)
    dtype = out.dtype

    def push(move: Move) -> Tensor:
        wide = _wide(value)
        mean, rstd = statistics or torch.native_layer_norm(wide, shape, None, None, eps)[1:]
        moved: Tensor = aten.native_layer_norm_backward(
            _wide(move(slot)), wide, shape, mean, rstd, None, None, (True, False, False)
        )[0]
        return (moved if weight is None else moved * weight).to(dtype)

    return out, push


def group_norm(
    func: Any,
    input: Any,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Outcome:
    if not _moves_alone(input, weight, bias):
        return by_dual_numbers(func, input, num_groups, weight, bias, eps)
    value, slot = input.value, input.slot
    sizes = len(value), value.shape[1], math.prod(value.shape[2:]), num_groups
    statistics: Sequence[Tensor] = ()
    if _fused(value, weight, bias) and (value.is_cuda or value.is_contiguous()):
        value = value.contiguous()  # as CUDA's kernel does; others keep channels last
        out, *statistics = torch.native_group_norm(value, weight, bias, *sizes, eps)
    else:
        out = func(value, num_groups, weight, bias, eps)
    dtype = out.dtype

    def push(move: Move) -> Tensor:
        wide = _wide(value).contiguous()
        mean, rstd = statistics or torch.native_group_norm(wide, None, None, *sizes, eps)[1:]
        moved = group_norm_tangent(_wide(move(slot)), wide, mean, rstd, weight, sizes)
        return moved.to(dtype)

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


def batch_norm(
    func: Any, input: Any, running_mean: Any, running_var: Any, *rest: Any, **named: Any
) -> Outcome:
    """Running statistics follow the values once: the derivative is taken without them."""
    if not (named.get("training") or named.get("use_input_stats")):
        return by_dual_numbers(func, input, running_mean, running_var, *rest, **named)
    with torch.no_grad():
        _, push = by_dual_numbers(func, input, None, None, *rest, **named)
    values = {name: value_of(part) for name, part in named.items()}
    return func(value_of(input), running_mean, running_var, *rest, **values), push


def rms_norm(
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Outcome:
    if not _moves_alone(input, weight):
        return by_dual_numbers(func, input, normalized_shape, weight, eps)
    value, slot = input.value, input.slot
    axes = tuple(range(-len(normalized_shape), 0))
    out = func(value, normalized_shape, weight, eps)
    dtype = out.dtype

    def push(move: Move) -> Tensor:
        wide, tangent = _wide(value), _wide(move(slot))
        least = torch.finfo(wide.dtype).eps if eps is None else eps
        scale = (wide.square().mean(axes, keepdim=True) + least).rsqrt()
        along = (wide * tangent).mean(axes, keepdim=True) * scale.square()
        moved = scale * torch.addcmul(tangent, wide, along, value=-1)
        return (moved if weight is None else moved * weight).to(dtype)

    return out, push


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


def _moves_alone(input: Any, *parameters: Any) -> bool:
    return type(input) is Lifted and not any_lifted(parameters)


def _fused(value: Tensor, *parameters: Tensor | None) -> bool:
    """Whether one kernel takes these as they are, without the casts of autocast."""
    return all(p is None or p.dtype == value.dtype for p in parameters) and not (
        torch.is_autocast_enabled(value.device.type)
    )


def _wide(x: Tensor) -> Tensor:
    """In the precision in which sums are taken."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
