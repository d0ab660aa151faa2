"""TwinFlow: a map that is drawn to the data by the velocities of its own samples and of the data.

A twin head learns the velocity of the law of the network's own samples, x = sg[x1 - u(x1, 1, 0)].
A quarter of the rows is of each kind:

    one step   (1, 0)            || u - sg[u - clip(g)] ||^2  and  || u - sg[u - clip(e)] ||^2
    short      (t, r >= .95 t)   || u - sg[u - clip(g)] ||^2
    any        (t, r)            || u - sg[u - clip(g)] ||^2
    twin       (t, t)            || twin(z_t, t) - (z - x) ||^2,  z_t = (1 - t) x + t z

z is fresh noise, and g the residual of RCGM (recursive_consistency.py). e is the velocity of
samples minus that of data, both at a point between a sample and fresh noise, at a uniform time s:

    e = twin(z_s, s) - u(z_s, s, s)

On the linear path -s e is the mean of the samples minus that of the data, given z_s. So u falls
where the samples must rise, as x1 - u does then. Where both laws are equal, e is zero, and the true
map is stationary, up to the bias of RCGM, O(delta) and the clip of g.

From the paper (Cheng et al., arXiv 2512.05150) and its released code: the quarters; the loss of
RCGM with its factor and its weight, which all three losses have; both clips by element; the mean of
the second loss over the one-step rows, times 0.5. Samples and velocities come from the network in
training, the targets of RCGM from its average of decay 0.99.

Our reading: the twin is an output of its own, where the paper asks the same network at negative
times. Samples and velocities are made in eval mode, and labels dropped in 10 % of the rows.
Guidance holds at t = 1, too, where the code leaves it out. The code can take its own samples in
place of all data; this is not here. On the same draws, in float64, loss and gradient differ from
the code's by 6e-16 (96 cases; the twin head at its negative times, guidance at t = 1 in both).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives, time_laws
from registry.protocols import (
    Batch,
    Draw,
    LossOutput,
    Network,
    Path,
    Residual,
    Teacher,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.ops import clipped, first_rows, mean_flat, normal_like, rms, rows_from, terms_of
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.velocities import Conditional, check_velocity, guided_by
from zoo.residuals import Exact, Rcgm, consistency_error, short_step_factor
from zoo.teachers import EmaTeacher, without_gradient
from zoo.times import TWINFLOW, DrawsSteps, Quarters, uniform_draws
from zoo.weighting import Adaptive


@objectives.register("twin_flow")
@dataclass(frozen=True, kw_only=True)
class TwinFlow(DrawsSteps):
    """RCGM, and a twin head whose velocity of the samples draws their law to that of the data."""

    heads: ClassVar[tuple[str, ...]] = ("u", "twin")
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = TWINFLOW
    exact_outputs: ClassVar = {"twin": "v"}
    # Where RCGM has no bias, and without RCGM, so that the rectification is seen alone.
    exact_with: ClassVar = ({"residual": Exact(), "clip": math.inf}, {"clip": 0.0})

    path: Path = field(default_factory=Linear)
    times: Quarters = field(default_factory=Quarters)
    velocity: VelocityEstimator = field(default_factory=Conditional)
    residual: Residual = field(default_factory=Rcgm)
    teacher: Teacher = field(default_factory=lambda: EmaTeacher(decay=0.99))
    weight: Weight = field(default_factory=lambda: Adaptive(power=0.5, offset=1e-6))
    clip: float = 1.0
    rectify_weight: float = 0.5
    rectify_clip: float = 1.0
    omega: float = 0.0
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.times, Quarters):
            raise ValueError(
                f"twin_flow.times = @{time_laws.name_of(self.times)}() does not say which rows are "
                "steps from noise to data. Bind twin_flow.times = @quarters(), and the law of its "
                "other steps to quarters.times"
            )
        if not 0 <= self.omega < 1:
            raise ValueError(
                f"twin_flow.omega = {self.omega!r} must lie in [0, 1): the guidance scale is "
                "1 / (1 - omega), and training diverges where omega >= 1"
            )
        check_velocity(
            "twin_flow", self.velocity, teacher=self.teacher, anchors=False, asks_for_maps=True
        )

    @property
    def guidance_scale(self) -> float:
        return 1 / (1 - self.omega)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        d, n = draw(batch, rng, self.path, self.times, self.label_dropout), len(batch)
        noise, s = batch.share.rows(normal_like(batch.x0, rng), uniform_draws(n, rng))
        k = batch.share.size(self.times.num_off_diagonal(n))
        e = batch.share.size(self.times.num_one_step(n))
        teacher, own = self.teacher(net), without_gradient(net)

        v_g = guided_by(self.velocity, d, teacher, rng, self.omega)[:k]
        point, cond = (d.x_t[:k], d.t[:k], d.r[:k]), first_rows(d.cond, k)
        out, error, g = consistency_error(self.residual, net, teacher, point, cond, v_g, self.clip)
        loss = short_step_factor(d.t[:k] - d.r[:k]) * self.weight(error, out)

        first = {name: rows[:e] for name, rows in out.items()}
        error_one = self._rectification(own, d, first["u"], noise[:e], s[:e])
        share = self.rectify_weight * n / self.times.num_one_step(n)  # a mean over these rows
        loss_one = share * self.weight(error_one, first)

        cond, t = rows_from(d.cond, k), d.t[k:]
        x = noise[k:] - own(noise[k:], torch.ones_like(t), torch.zeros_like(t), cond)["u"]
        sample = self.path.sample(x, d.x1[k:], t)
        twin = net(sample.x_t, t, t, cond)
        error_twin = mean_flat((twin["twin"] - sample.velocity) ** 2)
        return LossOutput(
            per_sample=torch.cat([loss[:e] + loss_one, loss[e:], self.weight(error_twin, twin)]),
            terms=terms_of(u=error, rectify=error_one, twin=error_twin),
            diagnostics={"residual_rms": rms(g)},
            t=d.t,
            r=d.r,
        )

    def _rectification(self, own: Network, d: Draw, u: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """|| u - sg[u - clip(e)] ||^2 [b] of the first rows, which are steps from noise to data."""
        rows = len(u)
        x = self.path.sample((d.x_t[:rows] - u).detach(), noise, s).x_t
        at_s = own(x, s, s, first_rows(d.cond, rows))
        e = clipped(at_s["twin"] - at_s["u"], self.rectify_clip, "element")
        return mean_flat((u - (u - e).detach()) ** 2)
