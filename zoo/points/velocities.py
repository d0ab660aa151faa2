"""What an objective takes for the velocity v(x_t, t) along the path.

    conditional   d x_t / dt at fixed x0 and x1; its mean given x_t is v
    plug_in       sum_j w_j v_j, the mean of d x_t / dt over the rows x0_j of the batch, with
                  w_j proportional to N((x_t - alpha x0_j) / sigma; 0, 1)
    own           the velocity of the network in training, without gradient
    teacher       the velocity of a trained teacher

v_j is the velocity of the conditional path from x0_j through x_t, so that

    v_j = v_c + (d_alpha - d_sigma alpha / sigma) (x0_j - x0)

and only x0_j - x0 is averaged: as sigma -> 0 the weights fall on the row itself, whose difference
is zero, and at alpha = 0 they are equal. The weights are taken of x1 + (alpha / sigma) (x0 - x0_j),
which is (x_t - alpha x0_j) / sigma without its cancellation, in float64.

The plug-in velocity is the mean of the conditional one, given x_t and the batch. So at the batch's
own points it has the same mean given x_t, v itself, and less variance: at a Gaussian in two
dimensions .94 without it, .45 with 4 rows, .17 with 32, .08 with 128, .03 with 1024. The bias that
ESC speaks of is that at a point drawn without the batch, where the mean is a ratio of two means: a
root mean square of .33, .073, .014 and .004 with 8, 32, 128 and 512 rows, about as 1 / n. Targets
are taken at the batch's own points alone.

From ESC (arXiv 2512.11831) and its released code: the plug-in velocity, on a random fifth of the
rows. The code weighs all rows that a process has, and its data loader may give each process rows of
one class, which `group` says here. Our reading: a row with a label averages over the batch's rows
of its own label, whether or not these have kept theirs; a row without a label averages over all
rows; other conditions must be equal too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import registry
from registry import velocities
from registry.protocols import Coupling, Draw, Network, Teacher, VelocityEstimator
from registry.ranges import Count, Probability
from zoo.guidance import check_interval, guided_target, inside, unlabelled, velocity_at
from zoo.ops import like
from zoo.times.sources import EXPLICIT_SHORTCUT


@velocities.register("conditional")
@dataclass(frozen=True, kw_only=True)
class Conditional:
    """The path's own velocity at fixed data and noise, such as x1 - x0."""

    def target(self, draw: Draw, teacher: Network, rng: torch.Generator) -> Tensor:
        return draw.velocity

    def along(self, guided: Tensor, own: Callable[[], Tensor]) -> Tensor:
        return guided


@velocities.register("plug_in")
@dataclass(frozen=True, kw_only=True)
class PlugIn:
    """The batch's posterior mean of the velocity on a share of the rows, else the conditional.

    With `group` above 1 each so many rows of a batch, one after the other, have one label: batches
    of many classes then have that many rows to average over.
    """

    couples_rows: ClassVar = True
    reference: ClassVar = EXPLICIT_SHORTCUT

    fraction: Probability = 0.2
    group: Count = 1

    def target(self, draw: Draw, teacher: Network, rng: torch.Generator) -> Tensor:
        n = len(draw.batch)
        chosen = torch.rand(n, generator=rng, device=rng.device) < self.fraction
        (chosen,) = draw.batch.share.rows(chosen)
        return torch.where(like(chosen, draw.x0), posterior_velocity(draw), draw.velocity)

    def along(self, guided: Tensor, own: Callable[[], Tensor]) -> Tensor:
        return guided


@velocities.register("own")
@dataclass(frozen=True, kw_only=True)
class Own:
    """The network's own velocity along the path, u(x, t, t) or v; targets stay conditional."""

    from_network: ClassVar = True

    def target(self, draw: Draw, teacher: Network, rng: torch.Generator) -> Tensor:
        return draw.velocity

    def along(self, guided: Tensor, own: Callable[[], Tensor]) -> Tensor:
        return own().detach()


@velocities.register("teacher")
@dataclass(frozen=True, kw_only=True)
class FromTeacher:
    """The velocity of the objective's trained teacher."""

    from_teacher: ClassVar = True

    def target(self, draw: Draw, teacher: Network, rng: torch.Generator) -> Tensor:
        return velocity_at(teacher, draw.x_t, draw.t, draw.cond)

    def along(self, guided: Tensor, own: Callable[[], Tensor]) -> Tensor:
        return guided


def guided_by(
    velocity: VelocityEstimator,
    draw: Draw,
    teacher: Network,
    rng: torch.Generator,
    share: float | Tensor,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    limit: float = math.inf,
) -> Tensor:
    """The estimator's target with guidance on top: v + share (v(y) - v(null)), of the teacher's v.

    Rows without a label and times outside the interval have none. `share` is 1 - 1/w for a scale w
    where the teacher learns from the result, and w - 1 where it was trained before.
    """
    v = velocity.target(draw, teacher, rng)
    with_label = v if getattr(velocity, "from_teacher", False) else None
    rows = draw.labelled & inside(draw.t, interval)
    return guided_target(v, teacher, draw.x_t, draw.t, draw.cond, rows, share, limit, with_label)


def mixed_by(
    velocity: VelocityEstimator,
    draw: Draw,
    teacher: Network,
    rng: torch.Generator,
    omega: float,
    kappa: float,
    interval: tuple[float, float],
    *,
    distils: bool,
) -> Tensor:
    """The estimator's target with MeanFlow's guidance: omega v + (1 - omega - kappa) u(null) +
    kappa u(y), of the teacher's u(x_t, t, t).

    Its fixed point is guidance of scale omega / (1 - kappa), with which a teacher that was trained
    before is guided at once. Rows without a label and times outside the interval have none.
    """
    if distils:
        scale = omega / (1 - kappa)
        return guided_by(velocity, draw, teacher, rng, scale - 1, interval=interval)
    v = velocity.target(draw, teacher, rng)
    if omega == 1 and kappa == 0:
        return v
    x, t, cond = draw.x_t, draw.t, draw.cond
    v_g = omega * v + (1 - omega - kappa) * teacher(x, t, t, unlabelled(cond))["u"]
    if kappa:
        v_g = v_g + kappa * teacher(x, t, t, cond)["u"]
    return torch.where(like(draw.labelled & inside(t, interval), v), v_g, v)


def posterior_velocity(draw: Draw) -> Tensor:
    """E[d x_t / dt | x_t, the batch], [b *d] for the rows of the share; see the module."""
    t, x0 = draw.t.double(), draw.x0.flatten(1).double()
    alpha, sigma = draw.path.alpha(t), draw.path.sigma(t)
    at_data = sigma == 0  # there the weights fall on the row itself
    ratio = alpha / torch.where(at_data, 1, sigma)
    rows = draw.batch.x0.flatten(1).double()
    weights = log_weights(ratio, x0, draw.x1.flatten(1).double(), rows)
    weights = weights.masked_fill(~_same_conditions(draw), -torch.inf).softmax(1)
    factor = draw.path.d_alpha(t) - draw.path.d_sigma(t) * ratio
    moved = torch.where(at_data, 0, factor)[:, None] * (weights @ rows - x0)
    return draw.velocity + moved.reshape(draw.x0.shape).to(draw.x0.dtype)


def log_weights(ratio: Tensor, x0: Tensor, x1: Tensor, rows: Tensor) -> Tensor:
    """log w_j [b n] up to a constant of each row, for the ratio alpha / sigma [b].

    -1/2 || x1 + ratio (x0 - x0_j) ||^2, without its part in || x1 ||^2.
    """
    along = (x1 * x0).sum(1, keepdim=True) - x1 @ rows.T
    # Without matrix products, which would not give 0 for a row and itself.
    squares = torch.cdist(x0, rows, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return -ratio[:, None] * along - ratio[:, None] ** 2 * squares / 2


def _same_conditions(draw: Draw) -> Tensor:
    """Which rows of the batch have the conditions of each row of the share, [b n]."""
    batch = draw.batch
    same = torch.ones(len(draw.x0), len(batch), dtype=torch.bool, device=draw.x0.device)
    (mine,) = batch.share.rows(batch.cond)
    for name, values in (batch.cond or {}).items():
        equal = (mine[name][:, None] == values).reshape(*same.shape, -1).all(2)
        same &= (equal | ~draw.labelled[:, None]) if name == "label" else equal
    return same


def check_mixture(name: str, kappa: float, interval: tuple[float, float]) -> None:
    """ValueError for guidance of the objective `name` that `mixed_by` cannot give."""
    check_interval(f"{name}.guidance_interval", interval)
    if not 0 <= kappa < 1:
        raise ValueError(f"{name}.kappa = {kappa!r} must lie in [0, 1)")


def check_velocity(
    name: str,
    velocity: VelocityEstimator,
    *,
    teacher: Teacher | None = None,
    coupling: Coupling | None = None,
    anchors: bool = True,
    asks_for_maps: bool = False,
) -> None:
    """ValueError for an estimator that makes no sense in the objective `name`.

    `teacher` is one that may have been trained before, and `asks_for_maps` says that the objective
    asks it for more than velocities. `anchors` says that states are moved along the velocity in
    some rows or losses, and that it is learned in others.
    """
    given, trained = f"{name}.velocity = {_shown(velocity)}", teacher and teacher.distils
    from_data = f"Bind {name}.velocity = @conditional() or @plug_in()"
    if getattr(velocity, "from_network", False) and not anchors:
        raise ValueError(
            f"{given} is the network's own velocity, which moves states in some rows and must be "
            f"learned in others; {name} does not have both. {from_data}"
        )
    from_teacher = getattr(velocity, "from_teacher", False)
    if from_teacher and not trained:
        without = f"{name}.teacher = {_shown(teacher)} was not" if teacher else f"{name} takes none"
        instead = f"Bind {name}.teacher = @frozen()" if teacher else from_data
        raise ValueError(
            f"{given} is the velocity of a teacher that was trained before, and {without}. "
            f"{instead}"
        )
    if trained and not (from_teacher or asks_for_maps):
        raise ValueError(
            f"{name}.teacher = {_shown(teacher)} was trained before, for its velocity, and "
            f"{given} is another one. Bind {name}.velocity = @teacher(), or {name}.teacher = "
            "@online()"
        )
    if all(getattr(part, "couples_rows", False) for part in (velocity, coupling)):
        raise ValueError(
            f"{given} averages over data that are independent of the noise, and {name}.coupling = "
            f"{_shown(coupling)} pairs them. Bind {name}.coupling = @independent(), or "
            f"{name}.velocity = @conditional()"
        )


def check_teachers_scale(name: str, scale: float, teacher: Teacher) -> None:
    """ValueError unless the scale is one, or above it for the velocity of a trained teacher."""
    if scale < 1:
        raise ValueError(f"{name}.guidance_scale = {scale!r} must be at least 1")
    if scale > 1 and not teacher.distils:
        raise ValueError(
            f"{name}.guidance_scale = {scale!r} is the scale of a trained teacher's velocity. Bind "
            f"{name}.velocity = @teacher() and {name}.teacher = @frozen(), or leave it at 1"
        )


def _shown(part: object) -> str:
    kind = registry.kind_of(part)
    return f"@{kind.name_of(part)}()" if kind else type(part).__name__
