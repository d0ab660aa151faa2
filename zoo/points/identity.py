"""MeanFlow's identity, u = v - (t - r) du/dt, as several objectives train it.

`outputs_and_target` gives u and that target. `velocity_errors` reads the identity the other way
round, as iMF and pMF do: V = u + (t - r) sg[du/dt] is a velocity, and is regressed like one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from registry.protocols import Derivative, Draw, LossOutput, Network, Weight
from zoo.derivatives.one_pass import outputs_and_derivative
from zoo.guidance import guidance_share, guided_target, velocity_at
from zoo.ops import first_rows, like, mean_flat, rms, sum_flat
from zoo.teachers import without_gradient


def outputs_and_target(
    derivative: Derivative | None, net: Network, d: Draw, along: Tensor, v: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The network's outputs, the target of u [b *d], and du/dt [k *d] along (along, 1, 0).

    `along` has the first k rows, whose target is v - (t - r) du/dt. That of the others, where r =
    t, is v [b *d]. Neither has a gradient. `derivative` is None if no share has a row with r < t.
    """
    k = len(along)
    tangents = along, torch.ones_like(d.t[:k]), torch.zeros_like(d.r[:k])
    out, du_dt = outputs_and_derivative(derivative, net, d.cond, (d.x_t, d.t, d.r), tangents)
    correction = like(d.t[:k] - d.r[:k], du_dt) * du_dt
    return out, torch.cat([v[:k] - correction, v[k:]]).detach(), du_dt


@dataclass(frozen=True)
class VelocityErrors:
    """The squared errors [b *d] of V and of v, and what they were made from."""

    draw: Draw
    out: dict[str, Tensor]
    u: Tensor
    v: Tensor
    du_dt: Tensor

    def loss(self, weight_u: Weight, weight_v: Weight) -> LossOutput:
        """Both errors, summed over the elements and weighted."""
        loss_u = weight_u(sum_flat(self.u), self.out)
        return LossOutput(
            per_sample=loss_u + weight_v(sum_flat(self.v), self.out),
            terms={"u": mean_flat(self.u).detach(), "v": mean_flat(self.v).detach()},
            diagnostics={"du_dt_rms": rms(self.du_dt)} if len(self.du_dt) else {},
            t=self.draw.t,
            r=self.draw.r,
        )


def velocity_errors(
    derivative: Derivative | None, net: Network, d: Draw, k: int, *, guided: bool
) -> VelocityErrors:
    """How far V, with the derivative on the first k rows, and the output v are from d.velocity.

    du/dt is taken along the network's own velocity. Where the draw is `guided`, the velocity that
    both are compared with has the guidance of each row on top.
    """
    model, x, t = without_gradient(net), d.x_t, d.t
    if guided:
        own, share = velocity_at(model, x, t, d.cond), guidance_share(d.cond, t)
        v = guided_target(d.velocity, model, x, t, d.cond, d.labelled, share, with_label=own)
    else:
        own, v = velocity_at(model, x[:k], t[:k], first_rows(d.cond, k)), d.velocity
    out, target, du_dt = outputs_and_target(derivative, net, d, own[:k], v)
    return VelocityErrors(d, out, (out["u"] - target) ** 2, (out["v"] - v) ** 2, du_dt)
