"""Rules for layers: linear layers, activations, dropout, norms and attention.

Activations work element by element and normalisations have symmetric Jacobians, so the kernels of
their backward passes give their tangents. The tangent of attention o = P v, P = softmax(s), is

    do = dP v + P dv,    dP = P (ds - sum_j P ds)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.derivatives.dual_tensors.refusals import BY_DUAL, refuse
from zoo.derivatives.dual_tensors.rules import any_dual, by_dual_numbers
from zoo.derivatives.dual_tensors.tensor import DualTensor, Resolve, RuleOutput, unwrapped

aten = torch.ops.aten

_AFFINE, _RUNNING = ("weight", "bias"), ("running_mean", "running_var")
_BATCH, _INSTANCE = ("training", "momentum", "eps"), ("use_input_stats", "momentum", "eps")
# The norms that update running statistics, with the names of their arguments in their order.
STATISTICAL: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", *_RUNNING, *_AFFINE, *_BATCH),
    F.instance_norm: ("input", *_RUNNING, *_AFFINE, *_INSTANCE),
    torch.batch_norm: ("input", *_AFFINE, *_RUNNING, *_BATCH, "cudnn_enabled"),
    torch.instance_norm: ("input", *_AFFINE, *_RUNNING, *_INSTANCE, "cudnn_enabled"),
    torch.native_batch_norm: ("input", *_AFFINE, *_RUNNING, *_BATCH),
}


def layer(
    func: Any, input: Any, weight: Any, bias: Any = None, *rest: Any, **named: Any
) -> RuleOutput:
    """Linear layers and convolutions: the input's tangent goes through them without the bias."""
    if type(input) is not DualTensor or any_dual((weight, bias)):
        return by_dual_numbers(func, input, weight, bias, *rest, **named)
    ref = input.tangent
    out = func(input.primal, weight, bias, *rest, **named)
    return out, lambda resolve: func(resolve(ref), weight, None, *rest, **named)


def activation(backward: Any, func: Any, input: Any, **kwargs: Any) -> RuleOutput:
    """Activations, by the kernel of their backward pass, `backward`."""
    kwargs.pop("inplace", None)
    primal, ref = input.primal, input.tangent
    out = func(primal, **kwargs)
    return out, lambda resolve: backward(resolve(ref), primal, **kwargs)


def dropout(
    func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> RuleOutput:
    """Dropout, with the same mask on the primal and its tangent."""
    if not training or p == 0:
        return input, None
    primal, ref = input.primal, input.tangent
    if primal.is_cuda and p < 1:
        out, mask = torch.native_dropout(primal, p, True)
        return out, lambda resolve: resolve(ref) * mask / (1 - p)
    noise = func(torch.ones_like(primal), p)  # as the kernels of other devices do, to the bit
    return primal * noise, lambda resolve: resolve(ref) * noise


def layer_norm(
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> RuleOutput:
    """Layer norm; the kernel of its backward pass gives the tangent."""
    if not _only_input_is_dual(input, weight, bias):
        return by_dual_numbers(func, input, normalized_shape, weight, bias, eps)
    primal, ref, shape = input.primal, input.tangent, list(normalized_shape)
    statistics: Sequence[Tensor] = ()
    if _fused(primal, weight, bias):
        out, *statistics = torch.native_layer_norm(primal, shape, weight, bias, eps)
    else:
        out = func(primal, shape, weight, bias, eps)
    dtype = out.dtype

    def jvp(resolve: Resolve) -> Tensor:
        wide = _wide(primal)
        if _of_dtype(wide.dtype, statistics):
            mean, rstd = statistics
        else:
            _, mean, rstd = torch.native_layer_norm(wide, shape, None, None, eps)
        tangent: Tensor = aten.native_layer_norm_backward(
            _wide(resolve(ref)), wide, shape, mean, rstd, None, None, (True, False, False)
        )[0]
        return (tangent if weight is None else tangent * weight).to(dtype)

    return out, jvp


def group_norm(
    func: Any,
    input: Any,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> RuleOutput:
    """Group norm; the kernel of its backward pass gives the tangent."""
    if not _only_input_is_dual(input, weight, bias):
        return by_dual_numbers(func, input, num_groups, weight, bias, eps)
    primal, ref = input.primal, input.tangent
    sizes = len(primal), primal.shape[1], math.prod(primal.shape[2:]), num_groups
    statistics: Sequence[Tensor] = ()
    if _fused(primal, weight, bias) and (primal.is_cuda or primal.is_contiguous()):
        primal = primal.contiguous()  # as CUDA's kernel does; others keep channels last
        out, *statistics = torch.native_group_norm(primal, weight, bias, *sizes, eps)
    else:
        out = func(primal, num_groups, weight, bias, eps)
    dtype = out.dtype

    def jvp(resolve: Resolve) -> Tensor:
        wide = _wide(primal).contiguous()
        if _of_dtype(wide.dtype, statistics):
            mean, rstd = statistics
        else:
            _, mean, rstd = torch.native_group_norm(wide, None, None, *sizes, eps)
        tangent = group_norm_tangent(_wide(resolve(ref)), wide, mean, rstd, weight, sizes)
        return tangent.to(dtype)

    return out, jvp


def group_norm_tangent(
    tangent: Tensor,
    primal: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    sizes: tuple[int, int, int, int],
) -> Tensor:
    """The tangent of a group norm's output, by the tangent of its input.

    `primal` [b c *d] is the input and contiguous; `mean` and `rstd` are the norm's statistics, and
    `sizes` are b, c, the product of d, and the number of groups.
    """
    out: Tensor = aten.native_group_norm_backward(
        tangent.contiguous(), primal, mean, rstd, None, *sizes, (True, False, False)
    )[0]
    return out if weight is None else weight.view(-1, *[1] * (primal.ndim - 2)) * out


def batch_norm(func: Any, *args: Any, **kwargs: Any) -> RuleOutput:
    """Batch and instance norm; only the pass of the value updates the running statistics."""
    without = without_statistics(func, args, kwargs)
    if without is None:
        return by_dual_numbers(func, *args, **kwargs)
    with torch.no_grad():
        _, jvp = by_dual_numbers(func, **without)
    values = {name: unwrapped(part) for name, part in kwargs.items()}
    return func(*map(unwrapped, args), **values), jvp


def without_statistics(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The arguments of a batch norm by name, without the running statistics that it would update.

    None for a norm that updates none: it is in evaluation mode.
    """
    by_place = STATISTICAL[func][: len(args)]  # those that follow are given by name, or left out
    given = dict(zip(by_place, args, strict=True)) | dict(kwargs)
    if not (given.get("training") or given.get("use_input_stats")):
        return None
    return given | {"running_mean": None, "running_var": None}


def rms_norm(
    func: Any,
    input: Any,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> RuleOutput:
    """Root-mean-square norm, with the tangent written out: torch has no kernel for it."""
    if not _only_input_is_dual(input, weight):
        return by_dual_numbers(func, input, normalized_shape, weight, eps)
    primal, ref = input.primal, input.tangent
    axes = tuple(range(-len(normalized_shape), 0))
    out = func(primal, normalized_shape, weight, eps)
    dtype = out.dtype

    def jvp(resolve: Resolve) -> Tensor:
        wide, tangent = _wide(primal), _wide(resolve(ref))
        least = torch.finfo(wide.dtype).eps if eps is None else eps
        scale = (wide.square().mean(axes, keepdim=True) + least).rsqrt()
        along = (wide * tangent).mean(axes, keepdim=True) * scale.square()
        out_tangent = scale * torch.addcmul(tangent, wide, along, value=-1)
        return (out_tangent if weight is None else out_tangent * weight).to(dtype)

    return out, jvp


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
) -> RuleOutput:
    """Attention: the value has its fused kernel, and the tangent has tokens x tokens matrices.

    NotImplementedError for dropout within attention, whose mask the fused kernel does not give.
    """
    named = dict(attn_mask=attn_mask, is_causal=is_causal, scale=scale, **kwargs)
    if dropout_p:
        refuse("dropout within attention", BY_DUAL)
    all_dual = all(type(x) is DualTensor for x in (query, key, value))
    if not all_dual or attn_mask is not None or is_causal or kwargs:
        return by_dual_numbers(func, query, key, value, **named)
    q, k, v = (x.primal for x in (query, key, value))
    refs = [x.tangent for x in (query, key, value)]
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def jvp(resolve: Resolve) -> Tensor:
        dq, dk, dv = map(resolve, refs)
        scaled = q * factor
        weights = (scaled @ k.mT).softmax(-1)
        d_weights = weights * (dq * factor @ k.mT + scaled @ dk.mT)
        d_weights = torch.addcmul(d_weights, weights, d_weights.sum(-1, keepdim=True), value=-1)
        return d_weights @ v + weights @ dv

    return func(q, k, v, scale=scale), jvp


def _only_input_is_dual(input: Any, *parameters: Any) -> bool:
    return type(input) is DualTensor and not any_dual(parameters)


def _fused(primal: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the kernel takes these tensors as they are: of one dtype, and without autocast."""
    return all(p is None or p.dtype == primal.dtype for p in parameters) and not (
        torch.is_autocast_enabled(primal.device.type)
    )


def _of_dtype(dtype: torch.dtype, statistics: Sequence[Tensor]) -> bool:
    """Whether a kernel has given statistics of this dtype: on a CPU they may be rounded to half."""
    return bool(statistics) and all(part.dtype == dtype for part in statistics)


def _wide(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision: in the precision in which kernels take sums."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
