"""The table of rules: each function and its rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.derivatives.dual_tensors.layers import (
    STATISTICAL,
    activation,
    attention,
    batch_norm,
    dropout,
    group_norm,
    layer,
    layer_norm,
    rms_norm,
)
from zoo.derivatives.dual_tensors.rules import (
    PRODUCTS,
    by_dual_numbers,
    concatenation,
    constant,
    data,
    like_another,
    linear_in_first,
    product,
    quotient,
    signed_sum,
    view,
)
from zoo.derivatives.dual_tensors.tensor import JvpRule

aten = torch.ops.aten


def rule_of(func: Any) -> JvpRule:
    """The rule of a function; `by_dual_numbers` for a function that is not in the table."""
    return RULES.get(func, by_dual_numbers)


def _methods(*names: str) -> list[Any]:
    return [getattr(Tensor, name) for name in names]


CONSTANT_ATTRIBUTES = (*("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"),)
CONSTANT_FUNCTIONS = (
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
    *(torch.rand_like, torch.randn_like, torch.detach),
)
CONSTANT_METHODS = (
    *("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "detach"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
)
VIEWS = (
    *("reshape", "flatten", "unflatten", "permute", "transpose", "t", "unsqueeze"),
    *("squeeze", "chunk", "split", "unbind", "expand", "contiguous", "clone", "to", "float"),
    *("movedim", "swapaxes", "narrow", "select", "mean", "sum", "neg", "roll", "flip"),
)
LAYERS = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)
RULES: dict[Any, JvpRule] = {
    **{getattr(Tensor, name).__get__: constant for name in CONSTANT_ATTRIBUTES},
    Tensor.data.__get__: data,  # type: ignore[attr-defined]
    **dict.fromkeys((*CONSTANT_FUNCTIONS, *_methods(*CONSTANT_METHODS)), constant),
    **dict.fromkeys(_methods(*VIEWS, "__getitem__", "__neg__"), linear_in_first),
    **dict.fromkeys(_methods("view", "view_as"), view),
    **dict.fromkeys(_methods("type_as", "expand_as", "reshape_as"), like_another),
    **{getattr(torch, n): linear_in_first for n in VIEWS if callable(getattr(torch, n, None))},
    **dict.fromkeys((F.interpolate, F.avg_pool2d, F.pixel_shuffle), linear_in_first),
    **dict.fromkeys(LAYERS, layer),
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), concatenation),
    **dict.fromkeys(
        (torch.add, *_methods("add", "__add__", "__radd__")), partial(signed_sum, (1, 1))
    ),
    **dict.fromkeys((torch.sub, *_methods("sub", "__sub__")), partial(signed_sum, (1, -1))),
    Tensor.__rsub__: partial(signed_sum, (-1, 1)),
    **dict.fromkeys(PRODUCTS, product),
    **dict.fromkeys((torch.matmul, torch.bmm, *_methods("matmul", "bmm", "__matmul__")), product),
    **dict.fromkeys((torch.div, *_methods("div", "__truediv__")), quotient),
    F.gelu: partial(activation, aten.gelu_backward),
    F.silu: partial(activation, aten.silu_backward),
    F.dropout: dropout,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    **dict.fromkeys(STATISTICAL, batch_norm),
    F.rms_norm: rms_norm,
    F.scaled_dot_product_attention: attention,
}
