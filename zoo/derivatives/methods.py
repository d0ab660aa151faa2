"""Directional derivatives of a network along (x, t, r): d/ds fn(primals + s tangents) at s=0.

`dual` and `jvp` are exact (forward mode). `finite_difference` has an error of O(step^2) plus
rounding of O(1e-7 / step), so it runs in float32 even under autocast. As functions all three run
without gradient, in a pass of their own. That serves the derivative inside a target, and sharded
engines, non-reentrant activation checkpointing and compilation too. The default, `one_pass`
(zoo/derivatives/one_pass.py), needs no pass of its own; it serves most runs, but neither ZeRO
stage 3 nor compiled networks.

Where the derivative itself is trained, `with_graph` gives it with its graph, together with the
outputs. `dual` and `jvp` take one pass for both; its backward costs twice that of a pass without a
derivative, since it goes back through the value and through the tangent. `finite_difference` takes
three passes, and three backwards.

Fused attention has no forward-mode rule, so forward-mode passes take the math kernel; ordinary
passes keep the fast one. forward_rules.py has rules of our own for some layers, and refuses what
would give a wrong derivative in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook

from registry import derivatives
from registry.protocols import Cond, Derivative, Network
from zoo.derivatives.dual_tensors.refusals import BY_DIFFERENCES
from zoo.derivatives.flash_attention import flash_attention
from zoo.derivatives.forward_rules import (
    DUAL,
    DUAL_GRAPH,
    GRAPH,
    STATISTICS,
    ForwardRules,
    Replaced,
)

Attention = Literal["math", "jvp_flash"]

NO_TANGENT = (
    "the network's output carries no tangent of (x, t, r): something in it cuts the forward-mode "
    "derivative, such as .detach(), .data, numpy or a float() of an input; take it out"
)

# How torch says that something in a network cannot pass in forward mode.
NO_FORWARD_MODE = ("forward AD", "forward mode AD", "functorch", "During a grad (vjp, jvp")


@contextmanager
def replay_rng() -> Iterator[None]:
    """Leave the global generators as they were: the next forward draws the same dropout masks."""
    with torch.random.fork_rng(devices=_cuda_devices()):
        yield


@contextmanager
def no_gradient() -> Iterator[None]:
    """Run without gradient, then clear the cache of autocast.

    The cache would hand its copies of the weights, made without gradient, to the passes that
    follow.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def kept_counts() -> Iterator[None]:
    """Leave the batches that batch norms have counted: the pass of the value counts them."""
    before: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # the counter itself, and its value

    def note(module: nn.Module, _inputs: object) -> None:
        counter = getattr(module, "num_batches_tracked", None)
        if isinstance(counter, Tensor) and module not in before:
            before[module] = counter, counter.clone()

    hook = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            for counter, value in before.values():
                counter.copy_(value)


@contextmanager
def own_pass() -> Iterator[None]:
    """A pass beside that of the value: without gradient, under its masks, and counted nowhere."""
    with no_gradient(), replay_rng(), kept_counts():
        yield


@derivatives.register("dual")
@dataclass(frozen=True, kw_only=True)
class Dual:
    """Exact, by dual numbers of torch.autograd.forward_ad; works in every engine.

    Where the derivative is trained, weights must be whole: not in stage 3 of ZeRO.

    `attention` is the kernel of its pass: torch's math kernel, or the one of
    flash_attention.py on CUDA.
    """

    needs_forward_ad: ClassVar = True
    differentiable: ClassVar = True

    attention: Attention = "math"

    def __post_init__(self) -> None:
        if self.attention not in get_args(Attention):
            allowed = ", ".join(get_args(Attention))
            raise ValueError(f"dual.attention = {self.attention!r}; allowed: {allowed}")

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        flash = {F.scaled_dot_product_attention: flash_attention}
        rules = {**DUAL, **(flash if self.attention == "jvp_flash" else {})}
        with own_pass(), _forward_mode(), forward_ad.dual_level(), ForwardRules(rules):
            duals = [
                forward_ad.make_dual(p.detach(), d.detach())
                for p, d in zip(primals, tangents, strict=True)
            ]
            tangent = forward_ad.unpack_dual(fn(*duals)).tangent
        if tangent is None:
            raise RuntimeError(NO_TANGENT)
        return tangent

    def with_graph(
        self,
        fn: Callable[..., Mapping[str, Tensor]],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One pass; NotImplementedError for the kernel of flash attention, which has no gradient
        of its tangent.
        """
        if self.attention != "math":
            raise NotImplementedError(
                f"dual.attention = {self.attention!r} gives a derivative without a gradient of its "
                "own, and this objective trains its derivative; bind dual.attention = 'math'"
            )
        with _forward_mode(), forward_ad.dual_level(), ForwardRules(DUAL_GRAPH):
            duals = [forward_ad.make_dual(p, d) for p, d in zip(primals, tangents, strict=True)]
            pairs = {name: forward_ad.unpack_dual(value) for name, value in fn(*duals).items()}
        if (tangent := pairs[key].tangent) is None:
            raise RuntimeError(NO_TANGENT)
        return {name: pair.primal for name, pair in pairs.items()}, tangent


@derivatives.register("jvp")
@dataclass(frozen=True, kw_only=True)
class Jvp:
    """Exact, by torch.func.jvp; a second opinion on `dual`, not for sharded engines."""

    needs_forward_ad: ClassVar = True
    differentiable: ClassVar = True

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        with own_pass(), _forward_mode(), ForwardRules(STATISTICS):
            detached = [tuple(p.detach() for p in given) for given in (primals, tangents)]
            return torch.func.jvp(fn, *detached)[1]

    def with_graph(
        self,
        fn: Callable[..., Mapping[str, Tensor]],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One pass."""

        def outputs(*at: Tensor) -> dict[str, Tensor]:
            return dict(fn(*at))

        with _forward_mode(), ForwardRules(GRAPH):
            out, moved, *_ = torch.func.jvp(outputs, tuple(primals), tuple(tangents))
        return out, moved[key]


@derivatives.register("finite_difference")
@dataclass(frozen=True, kw_only=True)
class FiniteDifference:
    """Approximate, by a central difference of two forwards in the weights' own precision."""

    needs_forward_ad: ClassVar = False
    differentiable: ClassVar = True

    step: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.step < 1:
            raise ValueError(f"finite_difference.step = {self.step!r} must lie in (0, 1)")

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        with no_gradient():
            return self._difference(fn, primals, tangents)

    def with_graph(
        self,
        fn: Callable[..., Mapping[str, Tensor]],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Three passes, of which the last one, at the primals, draws the masks of all three."""
        moved = self._difference(lambda *at: fn(*at)[key], primals, tangents)
        return dict(fn(*primals)), moved

    def _difference(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        def at(s: float) -> Tensor:
            with replay_rng():
                return fn(*(p + s * d for p, d in zip(primals, tangents, strict=True)))

        device = primals[0].device.type
        exactly = torch.autocast(device, enabled=False)
        with eager(), exactly, kept_counts(), Replaced(STATISTICS):
            return (at(self.step) - at(-self.step)) / (2 * self.step)


def derivative_of_u(
    derivative: Derivative,
    net: Network,
    cond: Cond | None,
    point: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The derivative of the network's u(x, t, r) at a point along tangents of (x, t, r)."""

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return net(x, t, r, cond)["u"]

    return derivative(u, point, tangents)


def with_derivatives(part: Any, choose: Callable[[Derivative], Derivative]) -> Any:
    """The same dataclass with choose(d) in place of every derivative d in its fields."""
    if isinstance(part, Derivative) and not isinstance(part, type):
        return choose(part)
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changed = {
        f.name: new
        for f in fields(part)
        if f.init and (new := with_derivatives(old := getattr(part, f.name), choose)) is not old
    }
    return replace(part, **changed) if changed else part


@contextmanager
def _forward_mode() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), eager():
        try:
            yield
        except RuntimeError as error:  # and NotImplementedError, which is one
            text = str(error)
            if BY_DIFFERENCES in text or not any(mark in text for mark in NO_FORWARD_MODE):
                raise
            raise NotImplementedError(f"{text.splitlines()[0]}; {BY_DIFFERENCES}") from error


def eager() -> AbstractContextManager[object]:
    """Run compiled networks uncompiled, as they were when the derivative was probed.

    torch has dropped the tangents of dual numbers in compiled code, whose rounding is as large as a
    finite difference.
    """
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
