"""What `one_pass` cannot follow, and the remedy that each error names.

A remedy must work. `@dual()` follows operations in place and draws of random numbers, in a pass of
its own. It follows an autograd.Function only if that has a jvp, and neither `out=`, nor a tensor
whose data are exchanged, nor an operator of torch.library: there the remedy is
`@finite_difference()`, which needs values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload

BY_DUAL = "choose @dual(), whose derivative takes a pass of its own"
BY_DIFFERENCES = "choose @finite_difference(), which needs values alone"
IN_PLACE = {
    f"__{name}__"
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem")
}

REENTRANT = " (for activation checkpointing: use_reentrant=False)"


def refuse(what: str, remedy: str) -> NoReturn:
    raise NotImplementedError(f"one_pass cannot follow {what}; {remedy}")


def refuse_gradient(gradient: Tensor) -> NoReturn:
    refuse(
        "an autograd.Function that gives a tensor without tangent",
        f"take it out, or {BY_DIFFERENCES}",
    )


def check_no_function(one: Tensor) -> None:
    """NotImplementedError for the output of an autograd.Function."""
    if one.grad_fn is not None:
        function = getattr(one.grad_fn, "_forward_cls", None)
        has_rule = getattr(function, "jvp", None) is not torch.autograd.Function.jvp
        refuse(
            f"{one.grad_fn.name()}, an autograd.Function",
            BY_DUAL if function is not None and has_rule else f"{BY_DIFFERENCES}{REENTRANT}",
        )


def check_one_record(func: Any, record: object, other: object) -> None:
    """NotImplementedError if tensors that meet in a function belong to several passes."""
    if record is not other:
        refuse(
            f"{name_of(func)} of tensors of two passes: the network keeps an activation from one "
            "call for the next, and its tangent belongs to that earlier call",
            "keep activation.detach() in its place",
        )


def check_unchanged(use: str, primal: Tensor, version: int) -> None:
    """NotImplementedError if the value was changed behind its tangent: x.detach().mul_(2)."""
    if primal._version != version:
        refuse(
            f"{use} of a tensor whose values were changed in place by .data or .detach()",
            f"compute a new tensor, or {BY_DIFFERENCES}",
        )


def check_writes_nowhere(func: Any, kwargs: Mapping[str, Any]) -> None:
    if name_of(func) == "_make_dual":
        refuse("forward-mode differentiation inside the network", BY_DIFFERENCES)
    if kwargs.get("out") is not None:
        refuse(f"{name_of(func)}, which writes in place by out=", BY_DIFFERENCES)
    if name_of(func) == "__set__":  # x.data = y: dual numbers keep the tangent of the former data
        refuse("__set__, which exchanges the data of a tensor", BY_DIFFERENCES)
    if _writes(func) or kwargs.get("inplace"):
        refuse(f"{name_of(func)}, which writes in place", BY_DUAL)


def refuse_compiled(func: Any) -> NoReturn:
    """For operators that are reached past the functions of Python, in compiled code."""
    if func is torch.ops.aten.detach.default:
        refuse("a copy without derivative, such as torch.tensor(x)", BY_DIFFERENCES)
    ours = func.namespace in ("aten", "prims")
    refuse(f"{func} into compiled code or torch.func", BY_DUAL if ours else BY_DIFFERENCES)


def name_of(func: Any) -> str:
    return str(func) if isinstance(func, OpOverload) else getattr(func, "__name__", str(func))


@cache
def _writes(func: Any) -> bool:
    if isinstance(func, OpOverload):
        return bool(func._schema.is_mutable)
    name = name_of(func)
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
