"""Rules and refusals for the passes of torch's own forward mode.

torch's forward-mode rule of a linear layer or convolution computes three products, one of them with
a weight tangent of zeros; `DUAL` has rules for the two that are needed. torch's rule of a group
norm makes a dozen passes over memory. The Jacobian of a normalisation is symmetric, so its tangent
comes from the fused kernel of the backward pass.

A batch norm updates its running statistics in the pass of the value. `STATISTICS` keeps the pass of
the derivative, which follows, from updating them again.

Where the derivative is trained, its tangents are differentiated once more, and some of torch's own
cannot be. That of a layer norm reads statistics that carry no gradient, so that its gradient is
wrong, and nothing says so. That of softmax is computed in place. `GRAPH` writes these and attention
out in elementary operations.

In two cases torch gives a wrong tangent and says nothing, and `ForwardRules` refuses both. A tensor
whose data are exchanged keeps the tangent of the former data, and the result of an operator of
torch.library has no tangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from zoo.derivatives.dual_tensors.layers import STATISTICAL, group_norm_tangent, without_statistics
from zoo.derivatives.dual_tensors.refusals import BY_DIFFERENCES
from zoo.derivatives.dual_tensors.tensor import can_have_tangent

Rules = Mapping[Any, Callable[..., Any]]

SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
OF_TORCH = ("aten", "prims", "prim", "higher_order")


class Replaced(TorchFunctionMode):
    """A mode in which these functions replace torch's."""

    def __init__(self, rules: Rules):
        super().__init__()
        self._rules = rules

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self._rules.get(func, func)(*args, **(kwargs or {}))


class ForwardRules(Replaced):
    """The same for a pass of dual numbers; NotImplementedError where a tangent would be lost."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == SET_DATA and _some_tangent(args):
            raise NotImplementedError(
                "the network exchanges the data of a tensor (x.data = y), which would "
                f"keep the tangent of the former data; compute a new tensor, or {BY_DIFFERENCES}"
            )
        out = super().__torch_function__(func, types, args, kwargs)
        if isinstance(func, (OpOverload, OpOverloadPacket)) and _namespace(func) not in OF_TORCH:
            numbers = [leaf for leaf in pytree.tree_leaves(out) if can_have_tangent(leaf)]
            if numbers and not _some_tangent(numbers) and _some_tangent((args, kwargs)):
                raise NotImplementedError(
                    f"{func}, an operator of torch.library, has no forward-mode rule and would "
                    f"lose the derivative; {BY_DIFFERENCES}"
                )
        return out


def _namespace(func: OpOverload | OpOverloadPacket) -> str:
    name = func._schema.name if isinstance(func, OpOverload) else func._qualified_op_name
    return str(name).split("::")[0]


def _some_tangent(arguments: Any) -> bool:
    return any(
        can_have_tangent(leaf) and forward_ad.unpack_dual(leaf).tangent is not None
        for leaf in pytree.tree_leaves(arguments)
    )


def _linear_in_first(
    layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    """A layer that is linear in its input, applied once to the value and once to the tangent."""
    value, tangent = forward_ad.unpack_dual(input)
    if tangent is None or not _fixed(weight, bias):
        return layer(input, weight, bias, *rest, **named)
    return forward_ad.make_dual(
        layer(value, weight, bias, *rest, **named), layer(tangent, weight, None, *rest, **named)
    )


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    value, tangent = forward_ad.unpack_dual(input)
    same = all(p.dtype == value.dtype for p in (weight, bias) if p is not None)
    if tangent is None or not same or not _fixed(weight, bias):
        return F.group_norm(input, num_groups, weight, bias, eps)
    value = value.contiguous()
    sizes = len(value), value.shape[1], math.prod(value.shape[2:]), num_groups
    out, mean, rstd = torch.native_group_norm(value, weight, bias, *sizes, eps)
    moved = group_norm_tangent(tangent, value, mean, rstd, weight, sizes)
    return forward_ad.make_dual(out, moved)


def _fixed(*parameters: Tensor | None) -> bool:
    return all(p is None or forward_ad.unpack_dual(p).tangent is None for p in parameters)


def _without_update(norm: Any, *args: Any, **kwargs: Any) -> Any:
    without = without_statistics(norm, args, kwargs)
    return norm(*args, **kwargs) if without is None else norm(**without)


STATISTICS: Rules = {norm: partial(_without_update, norm) for norm in STATISTICAL}
LAYERS = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)
DUAL: Rules = {
    **{layer: partial(_linear_in_first, layer) for layer in LAYERS},
    F.group_norm: _group_norm,
    **STATISTICS,
}


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    wide = _wide(input)
    axes = tuple(range(-len(normalized_shape), 0))
    centred = wide - wide.mean(axes, keepdim=True)
    return _scaled(_over_rms(centred, axes, eps), weight, bias, input)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    wide = _wide(input)
    least = torch.finfo(wide.dtype).eps if eps is None else eps
    axes = tuple(range(-len(normalized_shape), 0))
    return _scaled(_over_rms(wide, axes, least), weight, None, input)


def _over_rms(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    return x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, input: Tensor) -> Tensor:
    """x times weight plus bias: wide under autocast, as torch's norms are, else as the input."""
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return x if torch.is_autocast_enabled(input.device.type) else x.to(input.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _softmax(input: Tensor, dim: int, *rest: Any, dtype: torch.dtype | None = None) -> Tensor:
    dtype = next((part for part in rest if isinstance(part, torch.dtype)), dtype)
    wide = _wide(input) if dtype is None else input.to(dtype)
    weights = (wide - wide.detach().amax(dim, keepdim=True)).exp()
    weights = weights / weights.sum(dim, keepdim=True)
    return weights.to(input.dtype) if dtype is None else weights


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's scaled_dot_product_attention [b heads tokens channels], as its documentation has it.

    NotImplementedError for groups of heads that share keys.
    """
    if enable_gqa:
        raise NotImplementedError(
            "attention with enable_gqa has no derivative that can be trained here; "
            f"{BY_DIFFERENCES}"
        )
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = _softmax(scores, -1)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


def _refused_in_training(norm: Any, *args: Any, **kwargs: Any) -> Tensor:
    if without_statistics(norm, args, kwargs) is not None:
        raise NotImplementedError(
            "a norm over the batch in training has no derivative that can be trained here: "
            f"normalise within each row (layer_norm, group_norm), or {BY_DIFFERENCES}"
        )
    out: Tensor = norm(*args, **kwargs)
    return out


GRAPH: Rules = {
    **{norm: partial(_refused_in_training, norm) for norm in STATISTICAL},
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), _softmax),
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
}
DUAL_GRAPH: Rules = {**{layer: rule for layer, rule in DUAL.items() if layer in LAYERS}, **GRAPH}
