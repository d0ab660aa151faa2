"""Watched evaluations of an objective, for the tests that compute its loss a second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.networks import Evaluation, Shape, Tapped, Toy
from benchmarks.conformance.subject import random_batch
from registry.protocols import Batch, LossOutput, group_of, required_heads
from zoo.ops import like

# Times are float32, so a loss that is computed in another order agrees to this.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@dataclass(frozen=True)
class Seen:
    """What an objective did with one batch: its calls of the network, and its result."""

    net: Toy
    batch: Batch
    calls: list[Evaluation]
    out: LossOutput

    def trained(self) -> Evaluation:
        """The calls with gradient, as one."""
        calls = [call for call in self.calls if call.with_gradient]
        labels = [call.labels for call in calls]
        return Evaluation(
            *(torch.cat(part) for part in zip(*((c.x, c.t, c.r) for c in calls), strict=True)),
            None if labels[0] is None else torch.cat(labels),
            with_gradient=True,
        )

    def gradient(self, per_sample: Tensor | None = None) -> Tensor:
        """Of the summed loss, the objective's own by default."""
        loss = (self.out.per_sample if per_sample is None else per_sample).sum()
        found = torch.autograd.grad(
            loss, list(self.net.parameters()), allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in found])

    def agrees(self, per_sample: Tensor) -> None:
        """Another computation of the loss has the same rows and the same gradient."""
        torch.testing.assert_close(self.out.per_sample, per_sample, **CLOSE)
        ours, theirs = self.gradient(), self.gradient(per_sample)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def watch(
    objective: Any,
    *,
    shape: Shape = (2,),
    n: int = 12,
    labels: str = "given",
    step: int = 0,
    seed: int = 0,
    batch: Batch | None = None,
) -> Seen:
    net = Toy(shape, required_heads(objective))
    group = group_of(objective)
    batch = batch or random_batch(shape, n, labels=labels, step=step, seed=seed, group=group)
    tapped = Tapped(net, len(batch))
    out = objective.loss(tapped, batch, torch.Generator().manual_seed(seed))
    return Seen(net, batch, tapped.calls, out)


def noise_of(x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """x1 on the linear path, undoing the arithmetic that made x_t."""
    return (x_t - like(1 - t, x0) * x0) / like(t, x0)
