"""Exact forward-mode derivatives through weights that ZeRO stage 3 has sharded.

Stage 3 gathers the weights of a layer when the layer runs and releases them afterwards. It does so
in identity functions around every module, and autograd needs a forward-mode rule for each of them.
The rule is the identity. With it `dual` differentiates layer by layer while no weight stays
gathered, with the rounding of a single process. `torch.func.jvp` wraps the gathered weights and
cannot work. DeepSpeed's own linear layer for stage 3 has no such rule either, so it stays off
("memory_efficient_linear": false).

The functions have private names in DeepSpeed. So they get their rule only in versions that were
tried, and before the first update the derivative is compared with a central difference through the
same shards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from registry.protocols import Batch, Derivative, Objective, parts
from trainers import ranks
from trainers.derivative_probe import add_noise
from trainers.rng import generator
from trainers.sharding import shape_of, shards
from zoo.derivatives.methods import Dual, FiniteDifference
from zoo.ops import like, normal_like

TRIED = ("0.19.",)  # how the versions of DeepSpeed that were tried begin
BOUND = 5e-2  # central differences in float32 are themselves right to about 1 %
STEPS = (1e-2, 1e-3, 1e-4)  # which is best depends on the network
ROWS = 2

log = logging.getLogger(__name__)


class NoExactDerivative(RuntimeError):
    """Forward mode does not work through these shards; the message says why."""


def allow_forward_mode(module: nn.Module) -> None:
    """Give the identity functions of ZeRO-3 around every submodule their forward-mode rule."""
    for submodule in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if (function := submodule.__dict__.get(name)) is not None:
                function.jvp = staticmethod(_identity)


def _identity(ctx: Any, tangent: Tensor | None) -> Tensor | None:
    return None if tangent is None else tangent.view_as(tangent)


def needs_forward_mode(objective: Objective) -> bool:
    return any(
        isinstance(part, Derivative) and part.needs_forward_ad for _, part in parts(objective)
    )


def check_exact(net: nn.Module, objective: Objective, batch: Batch) -> None:
    """NoExactDerivative unless `dual` agrees with a difference on two rows, weights perturbed."""
    version = metadata.version("deepspeed")
    if not version.startswith(TRIED):
        raise NoExactDerivative(
            f"DeepSpeed {version} is none of the versions that this was tried with "
            f"({', '.join(f'{v}x' for v in TRIED)})"
        )
    wrong = [
        type(part).__name__
        for _, part in parts(objective)
        if isinstance(part, Derivative) and part.needs_forward_ad and not isinstance(part, Dual)
    ]
    if wrong:
        raise NoExactDerivative(
            f"{', '.join(wrong)} cannot differentiate through sharded weights; bind @dual()"
        )
    with _perturbed(net):
        error = _error(net, batch, "u" if "u" in objective.heads else objective.heads[0])
    if not error <= BOUND:
        raise NoExactDerivative(
            f"its relative error is {error:.2g}, more than {BOUND:g}, against a central difference"
        )


@contextmanager
def _perturbed(net: nn.Module) -> Iterator[None]:
    """Put noise on all weights, in place, and give them their values back afterwards."""
    kept = []
    with shards(net), torch.no_grad():
        for i, p in enumerate(net.parameters()):
            kept.append(p.detach().clone())
            add_noise(p, shape_of(p), generator(1, ranks.number(), i, p.device))
    try:
        yield
    finally:
        with shards(net), torch.no_grad():
            for p, before in zip(net.parameters(), kept, strict=True):
                p.copy_(before)


def _error(net: nn.Module, batch: Batch, key: str) -> float:
    x0 = batch.x0[:ROWS]
    cond = batch.cond and {name: value[:ROWS] for name, value in batch.cond.items()}
    x1 = normal_like(x0, generator(0, 0, 0, x0.device))
    t = torch.linspace(0.4, 0.8, ROWS, device=x0.device)
    primals = (x0 + like(t, x0) * (x1 - x0), t, t / 2)
    tangents = (x1 - x0, torch.ones_like(t), -torch.ones_like(t))

    def output(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return net(x, t, r, cond)[key]

    try:
        found = Dual()(output, primals, tangents)
    except (RuntimeError, NotImplementedError) as error:
        raise NoExactDerivative(str(error).splitlines()[0].rstrip(".")) from error
    expected = [FiniteDifference(step=step)(output, primals, tangents) for step in STEPS]
    return min(float((found - e).norm() / e.norm().clamp_min(1e-12)) for e in expected)
