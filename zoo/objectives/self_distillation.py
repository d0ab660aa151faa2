"""Self-distillation of the flow map: it must agree with the velocity that it has learned itself.

Rows with r = t are flow matching, || u(x_t, t, t) - v ||^2, so that v(x, t) = u(x, t, t) becomes
the velocity. In rows with r < t the map X(x, t, r) = x - (t - r) u(x, t, r) is held against one of
three identities, each of which holds for the flow map of that velocity alone:

    lsd   || dX/dr - sg v(X, r) ||^2              Lagrangian: the end of a step moves with the flow
    esd   || dX/dt + grad X sg v(x_t, t) ||^2     Eulerian: the end stays while the start moves
    psd   || u(x_t, t, r) - sg[ a u(x_t, t, m) + (1 - a) u(X(x_t, t, m), m, r) ] ||^2,
          m = t - a (t - r)                       progressive: one step is two, over (t - r)^2

In terms of u, dX/dr = u - (t - r) du/dr. dX/dt + grad X v = v - u - (t - r) Du, with the derivative
Du along (v, 1, 0). A gradient runs through both derivatives. esd without it is MeanFlow with
velocity = @own(). With gradient = "full" nothing is held fixed: the loss is the squared residual.

From the paper (Boffi, Albergo and Vanden-Eijnden, arXiv 2505.18825) and its code, read in a public
copy: the three losses with both gradients, a quarter of the rows off the diagonal, uniform times, a
learned log-variance of (t, r) for images and none in two dimensions, a = 1/2 or uniform. Loss and
gradient are those of the copy to 2e-15, in 40 cases on the same draws. Its third gradient of esd,
which holds grad X v too, is not here. SplitMeanFlow (Guo et al., arXiv 2507.16884) is psd with the
uniform split, unweighted. Our reading: means over elements in place of sums, and labels dropped in
10 % of the rows. With velocity = @teacher() and teacher = @frozen() lsd and esd distil a trained
velocity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Cond,
    DifferentiableDerivative,
    LossOutput,
    Network,
    Path,
    Reference,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.derivatives.methods import Dual
from zoo.guidance import velocity_at
from zoo.ops import first_rows, like, mean_flat, rows_from, terms_of
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_velocity
from zoo.residuals import Rows, end_of_step, start_of_step, two_step_residual
from zoo.teachers import Online
from zoo.times import SplitsSteps, UniformPair, uniform_draws
from zoo.weighting import LearnedLogvar

Kind = Literal["lsd", "esd", "psd"]
Gradient = Literal["semi", "full"]
Split = Literal["uniform", "midpoint"]


@objectives.register("self_distillation")
@dataclass(frozen=True, kw_only=True)
class SelfDistillation(SplitsSteps):
    """A flow map that is taught by its own velocity, in one of three ways; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = Reference(
        title="How to Build a Consistency Model: Learning Flow Maps via Self-Distillation",
        authors="Boffi et al.",
        year=2025,
        arxiv="2505.18825",
    )

    kind: Kind = "lsd"
    gradient: Gradient = "semi"
    split: Split = "uniform"  # of psd
    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=lambda: UniformPair(diagonal="uniform"))
    velocity: VelocityEstimator = field(default_factory=Conditional)
    teacher: Teacher = field(default_factory=Online)
    derivative: DifferentiableDerivative | None = field(default_factory=Dual)  # psd has none
    weight: Weight = field(default_factory=LearnedLogvar)
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        me, maps, teacher = "self_distillation", self.kind == "psd", self.teacher
        for name, choices in (("kind", Kind), ("gradient", Gradient), ("split", Split)):
            if (value := getattr(self, name)) not in (allowed := get_args(choices)):
                raise ValueError(f"{me}.{name} = {value!r}; allowed: {', '.join(allowed)}")
        check_velocity(me, self.velocity, teacher=teacher, anchors=False, asks_for_maps=maps)
        if self.gradient == "full" and teacher != Online():
            raise ValueError(
                f"{me}.gradient = 'full' sends a gradient into the targets, which the network in "
                f"training then gives; bind {me}.teacher = @online() or {me}.gradient = 'semi'"
            )
        if self.derivative not in (None, Dual()) if maps else self.derivative is None:
            raise ValueError(
                f"{me}.derivative = {self.derivative!r} does not go with {me}.kind = "
                f"{self.kind!r}: psd takes none, lsd and esd need one such as @dual()"
            )
        if maps:
            object.__setattr__(self, "derivative", None)

    @property
    def differentiates(self) -> tuple[str, ...]:
        derivative = () if self.kind == "psd" else ("derivative",)
        entered = () if self.kind == "esd" else ("input",)
        return (*derivative, *entered, "target") if self.gradient == "full" else derivative

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        teacher, quota = self.teacher(net), self.times.num_off_diagonal(len(batch))
        v, k = self.velocity.target(d, teacher, rng), batch.share.size(quota)
        a = uniform_draws(len(batch), rng)
        (a,) = batch.share.rows(a if self.split == "uniform" else torch.full_like(a, 0.5))
        found: list[tuple[dict[str, Tensor], Tensor]] = []
        if quota:
            rows, given = (d.x_t[:k], d.t[:k], d.r[:k]), first_rows(d.cond, k)
            targets = net if self.gradient == "full" else teacher
            found.append(self.residual(net, targets, rows, given, a[:k]))
        if quota < len(batch):
            out = net(d.x_t[k:], d.t[k:], d.t[k:], rows_from(d.cond, k))
            found.append((out, out["u"] - v[k:]))

        out = {name: torch.cat([part[name] for part, _ in found]) for name in found[0][0]}
        error = mean_flat(torch.cat([residual for _, residual in found]) ** 2)
        terms = terms_of(map=error[:k], v=error[k:])
        return LossOutput(per_sample=self.weight(error, out), terms=terms, t=d.t, r=d.r)

    def residual(
        self, net: Network, teacher: Network, rows: Rows, cond: Cond | None, a: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The network's outputs at rows with r < t, and what the identity leaves there [k *d]."""
        x, t, r = rows
        if self.derivative is None:
            out, step = dict(net(*rows, cond)), a * (t - r)
            first = teacher(x, t, t - step, cond)["u"]
            g = two_step_residual(teacher, rows, step, cond, out["u"], first)
            return out, like(a, x) * g  # g is one step less two, over the length of the first
        if self.kind == "esd":
            v = velocity_at(teacher, x, t, cond)
            return start_of_step(self.derivative, net, rows, cond, v)
        out, end, dx_dr = end_of_step(self.derivative, net, rows, cond)
        end = end if self.gradient == "full" else end.detach()
        return out, dx_dr - velocity_at(teacher, end, r, cond)
