"""Rules and refusals for the passes of torch's own forward mode.

torch's forward-mode rule of a linear layer or convolution computes three products, one of them with
a weight tangent of zeros; `DUAL` has rules for the two that are needed. torch's rule of a group
norm makes a dozen passes over memory. The Jacobian of a normalisation is symmetric, so its tangent
comes from the fused kernel of the backward pass.

A batch norm updates its running statistics in the pass of the value. `STATISTICS` keeps the pass of
the derivative, which follows, from updating them again.

torch's tangents of norms read statistics that carry no gradient, so that the gradient of such a
tangent would be wrong. Where the derivative is trained, `GRAPH` writes the norms out in elementary
operations, each of which torch differentiates twice.

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


def _written_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    grouped = _wide(input).reshape(len(input), num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    out = _over_rms(centred, (-1,), eps).reshape(input.shape)
    over_channels = (-1, *[1] * (input.ndim - 2))
    weight, bias = (None if p is None else p.reshape(over_channels) for p in (weight, bias))
    return _scaled(out, weight, bias, input)


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


GRAPH: Rules = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _written_group_norm),
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
}
DUAL_GRAPH: Rules = {**{layer: rule for layer, rule in DUAL.items() if layer in LAYERS}, **GRAPH}
