"""Decoupled MeanFlow (DMF): a flow model becomes a flow map, by blocks that see one time each.

    v    || u(x_s, s, s) - v_g ||^2                            on every row
    u    || u(x_t, t, r) - sg[ v_g - (t - r) du/dt ] ||^2      on every row

The two have noise, times and dropped labels of their own: with one draw for both the paper's
training was not stable, as readers quote it. Each error is a mean over the elements and enters as
half of

    log(exp(-phi) error + c) + phi,        phi(t, r) learned by the network

In the network (`decoder_from` of the backbones `dit` and `mlp`) the first blocks see t alone and
the others r alone, by one embedder of times. So it has the weights of a flow-matching network, and
is one where r = t: it starts from such weights (run.pretrain, run.start_from) and goes on learning
the velocity beside the map. Any other network of two times is taken as well.

Guidance replaces the conditional velocity v_c, where the row has its label and t lies inside the
interval, by

    v_g = v_c + omega ( u(x_t, t, t, y) - u(x_t, t, t, null) )        scale 1 / (1 - omega)

or, with velocity = @teacher() and a frozen teacher, by the guided velocity of that teacher.

From the paper (Lee et al., arXiv 2510.24474) and its released code: all of the above, s =
sigmoid(N(0, 1)), t and r the larger and the smaller of sigmoid(N(0.4, 1)) and sigmoid(N(-1.2, 1)),
omega = 0.6 for t up to 0.7. Our reading: the code drops the labels of both terms together, and with
a teacher it drops none; phi is a function of t and r with the head `log_variance_of_times`, as in
the code, and of the conditioning with the default head; a row's phi meets the error of that row,
where the shapes in the code pair it with the errors of all rows. Without that pairing, loss and
gradient are those of the released code to 2e-15 on 36 forced draws in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from registry import objectives
from registry.protocols import (
    Batch,
    Derivative,
    Draw,
    LossOutput,
    Network,
    Path,
    Teacher,
    TimeLaw,
    VelocityEstimator,
    Weight,
)
from registry.ranges import Probability
from zoo.derivatives.one_pass import OnePass
from zoo.guidance import check_interval, velocity_at
from zoo.ops import first_rows, mean_flat, rms
from zoo.paths import Linear
from zoo.points.draws import draw
from zoo.points.identity import outputs_and_target
from zoo.points.velocities import Conditional, check_velocity, guided_by
from zoo.teachers import Online
from zoo.times import DrawsSteps, LogitNormal, TwoLogitNormals
from zoo.weighting import DECOUPLED_MEAN_FLOW, Cauchy


def sorted_pair() -> TwoLogitNormals:
    """The paper's law of t and r."""
    return TwoLogitNormals(
        t_mean=0.4, t_std=1.0, r_mean=-1.2, r_std=1.0, off_diagonal_fraction=1.0, pairing="sorted"
    )


@objectives.register("decoupled_mean_flow")
@dataclass(frozen=True, kw_only=True)
class DecoupledMeanFlow(DrawsSteps):
    """Flow matching and MeanFlow on every row, with draws of their own; one head."""

    heads: ClassVar[tuple[str, ...]] = ("u",)
    trains: ClassVar[tuple[str, ...]] = ("map", "velocity")
    reference: ClassVar = DECOUPLED_MEAN_FLOW

    path: Path = field(default_factory=Linear)
    times: TimeLaw = field(default_factory=sorted_pair)
    times_v: TimeLaw = field(default_factory=LogitNormal)
    velocity: VelocityEstimator = field(default_factory=Conditional)
    teacher: Teacher = field(default_factory=Online)
    derivative: Derivative = field(default_factory=OnePass)
    weight: Weight = field(default_factory=Cauchy)
    omega: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    label_dropout: Probability = 0.1

    def __post_init__(self) -> None:
        check_interval("decoupled_mean_flow.guidance_interval", self.guidance_interval)
        if not 0 <= self.omega < 1:
            raise ValueError(
                f"decoupled_mean_flow.omega = {self.omega!r} must lie in [0, 1): the guidance "
                "scale is 1 / (1 - omega), and training diverges where omega >= 1"
            )
        check_velocity("decoupled_mean_flow", self.velocity, teacher=self.teacher)

    @property
    def guidance_scale(self) -> float:
        return 1 / (1 - self.omega)

    def loss(self, net: Network, batch: Batch, rng: torch.Generator) -> LossOutput:
        at_v = draw(batch, rng, self.path, self.times_v, self.label_dropout)
        d = draw(batch, rng, self.path, self.times, self.label_dropout)
        teacher = self.teacher(net)

        out_v = net(at_v.x_t, at_v.t, at_v.t, at_v.cond)
        error_v = mean_flat((out_v["u"] - self._guided(at_v, teacher, rng)) ** 2)

        v = self._guided(d, teacher, rng)
        quota = self.times.num_off_diagonal(len(batch))
        k, derivative = batch.share.size(quota), self.derivative if quota else None
        first = d.x_t[:k], d.t[:k], first_rows(d.cond, k)
        along = self.velocity.along(v[:k], lambda: velocity_at(teacher, *first))
        v = torch.cat([along, v[k:]])
        out, target, du_dt = outputs_and_target(derivative, net, d, along, v)
        error = mean_flat((out["u"] - target) ** 2)
        return LossOutput(
            per_sample=0.5 * (self.weight(error_v, out_v) + self.weight(error, out)),
            terms={"v": error_v.detach(), "u": error.detach()},
            diagnostics={"du_dt_rms": rms(du_dt)} if k else {},
            t=d.t,
            r=d.r,
        )

    def _guided(self, d: Draw, teacher: Network, rng: torch.Generator) -> Tensor:
        """v_g on the labelled rows inside the interval, v elsewhere."""
        share = self.guidance_scale - 1 if self.teacher.distils else self.omega
        return guided_by(self.velocity, d, teacher, rng, share, interval=self.guidance_interval)
