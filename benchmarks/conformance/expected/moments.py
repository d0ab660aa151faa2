"""The mean gradient at the exact solution, in units of the velocity.

The network is an oracle with trainable additions that are zero (`WithMoments`). Their mean gradient
is the moment of the loss's slope with smooth functions of (x, t, r) and the label, and it is zero
at a fixed point. Means over blocks of rows are compared with the spread of the blocks; "z" is
Student's t, turned into the normal deviate of equal probability. At the mixture the blocks are
parts of one batch, since a call of its flow map costs nearly as much for few rows as for many,
unless a row's loss depends on rows of other groups.

The gradient divided by its own slope is the shift of the optimum. The slope is that which an error
gives which is in every call of the network, in targets and in averages of the weights too. A method
that compares two points at a small distance pulls an error of both back by a small force, and a
mistake in it is as small; so one is measured by the other. Each kind of rows (kinds.py) is
weighed alone at each stage of a schedule, so that an error in few rows or at one stage does not
pass. Where the objective is exact, its slope at the Gaussian serves for both laws: z does not
depend on it. By default its weights may depend on the law, and so does its slope.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.conformance.expected.kinds import ALL, losses_by_kind
from benchmarks.conformance.networks import Shifted, WithMoments
from benchmarks.conformance.subject import GAUSSIAN, MIXTURE, Subject, gradients
from registry.protocols import LossOutput
from zoo.derivatives.one_pass import apart
from zoo.oracles import GaussianOracle, Oracle

ROWS_AND_BLOCKS = {GAUSSIAN: (1536, 24), MIXTURE: (256, 32)}
# Where each row is compared with each, small batches show best what a row does to itself.
PAIRED = {GAUSSIAN: (128, 96), MIXTURE: (128, 48)}
FEWEST = 12  # blocks of one stage
OTHER = GaussianOracle([-0.4, 0.6], [0.8, 0.4])
OTHER_ROWS, OTHER_SEEDS = 256, range(16)  # one block for each seed
MOST_ROWS = 4096  # of one batch, since a gradient may keep all steps of the mixture's flow map
SLOPE_ROWS = {GAUSSIAN: 512, MIXTURE: 256}
# Shifts below this come from arithmetic: float32 times, and the error of the mixture's flow map.
FLOOR = {GAUSSIAN: 1e-5, MIXTURE: 1e-4}
EPS = 0.1
ROUNDING = 1e-9  # a slope below it is none: the loss of these rows does not hold the output


@dataclass(frozen=True)
class Bias:
    """The mean gradient in one moment of one output, of one kind of rows at one stage."""

    z: float  # in standard errors
    shift: float  # of the optimum, in units of velocity
    error: float  # its standard error
    output: str
    number: int  # of the moment
    kind: str = ALL
    step: int = 0

    @property
    def name(self) -> tuple[int, str, int]:
        """The same for the same moment of another draw."""
        return self.step, self.kind, self.number


def measure(subject: Subject, law: Oracle, *, exact: bool = True) -> Bias:
    """The largest of the mean gradients, in standard errors."""
    return largest(moments(subject, law, exact=exact))


def moments(
    subject: Subject, law: Oracle, *, exact: bool = True, times: float = 1, seed: int = 0
) -> list[Bias]:
    """The mean gradients of all moments, kinds of rows and stages, from `times` the usual blocks.

    A kind of rows that fewer than half of the blocks have is left out. The mixture's flow map is
    expensive, so that the stages share its blocks, down to FEWEST.
    """
    num_rows, num_blocks = (PAIRED if subject.couples_rows else ROWS_AND_BLOCKS)[law]
    stages = subject.stages(exact=exact)
    share = 1 if law is GAUSSIAN else len(stages)
    seeds = range(seed, seed + max(int(times * num_blocks) // share, FEWEST))
    return [bias for step in stages for bias in _at(step, subject, law, exact, num_rows, seeds)]


def at_other_solution(subject: Subject) -> Iterator[Bias]:
    """At each stage the largest mean gradient at the exact solution for other data.

    It is no fixed point of what learns from the data, and one of what must agree with itself.
    """
    for step in subject.stages(exact=True):
        yield largest(_at(step, subject, GAUSSIAN, True, OTHER_ROWS, OTHER_SEEDS, solution=OTHER))


def largest(biases: Collection[Bias]) -> Bias:
    """The largest in standard errors. A nan is within no limit, so it is the largest."""
    return max(biases, key=lambda bias: math.inf if math.isnan(bias.z) else bias.z)


def normal_deviate(log_tail: float) -> float:
    """The z with P(N(0, 1) > z) = exp(log_tail), but at most 37."""
    return float(stats.norm.isf(math.exp(max(log_tail, -700.0))))


def slopes_in(out: LossOutput, bias: Tensor) -> dict[str, float]:
    """For each kind of rows, the gradient of its mean loss in one parameter."""
    return {
        kind: float(gradients(loss, [bias], again=True)[0]) for kind, loss in losses_by_kind(out)
    }


def _at(
    step: int,
    subject: Subject,
    law: Oracle,
    exact: bool,
    num_rows: int,
    seeds: range,
    solution: Oracle | None = None,
) -> list[Bias]:
    """The mean gradients at the law's own solution, or at that of another one."""
    truth = network = subject.exact_network(law, exact=exact)
    if solution is not None:
        network = subject.exact_network(solution, exact=exact)
    outputs = tuple(subject.exact_outputs)
    probe = WithMoments(network, law.shape[0], outputs)
    parameters: list[Tensor] = list(probe.parameters())
    names = [name.split(".")[1] for name, p in probe.named_parameters() for _ in range(p.numel())]
    found: dict[str, list[Tensor]] = {}
    for out in _blocks(step, subject, law, exact, probe, num_rows, seeds, truth):
        for kind, loss in losses_by_kind(out):
            gradient = torch.cat([g.flatten() for g in gradients(loss, parameters, again=True)])
            found.setdefault(kind, []).append(gradient)
    slopes = {key: _slopes(subject, law, key, step, exact) for key in outputs}
    biases = []
    for kind, rows in found.items():
        if 2 * len(rows) >= len(seeds) and all(kind in slopes[key] for key in outputs):
            scale = torch.tensor([slopes[name][kind] for name in names], dtype=torch.float64)
            biases += _biases(torch.stack(rows) / scale, names, FLOOR[law], kind, step)
    return biases


def _blocks(
    step: int,
    subject: Subject,
    law: Oracle,
    exact: bool,
    probe: WithMoments,
    num_rows: int,
    seeds: range,
    truth: nn.Module | None = None,
) -> Iterator[LossOutput]:
    """The losses of each block of rows, as many as there are seeds; the teacher is the truth."""
    objective = _objective(
        subject, law, exact=exact, teacher=truth or probe.network, average=probe.network
    )
    groups = math.ceil(num_rows / subject.group)  # of a block
    alone = law is GAUSSIAN or subject.couples_rows
    in_one = 1 if alone else max(MOST_ROWS // (groups * subject.group), 1)
    for first in seeds[::in_one]:
        num = min(in_one, seeds.stop - first)
        batch = subject.batch_of(law, num * groups * subject.group, first, step)
        out = subject.loss(objective, probe, batch, first)
        # Every num-th group: rows of one kind stand together, and each block gets its part.
        block = torch.arange(len(batch)) // subject.group % num
        yield from (_rows(out, block == number) for number in range(num))


def _objective(subject: Subject, law: Oracle, **how: Any) -> Any:
    """The objective; at the mixture its derivatives take passes of their own, which cost less."""
    objective = subject.objective(**how)
    return objective if law is GAUSSIAN else apart(objective)


def _rows(out: LossOutput, rows: Tensor) -> LossOutput:
    t, r = (
        None if time is None or len(time) != len(rows) else time[rows] for time in (out.t, out.r)
    )
    return replace(out, per_sample=out.per_sample[rows], t=t, r=r)


def _biases(
    gradient: Tensor, names: list[str], floor: float, kind: str = ALL, step: int = 0
) -> list[Bias]:
    """Of gradients [blocks parameters] in units of a shift."""
    shift, freedom = gradient.mean(0).abs(), len(gradient) - 1
    error = gradient.std(0) / len(gradient) ** 0.5
    t = (shift - floor).clamp_min(0) / error.clamp_min(torch.finfo(error.dtype).tiny)
    tails = stats.t.logsf(t.numpy(), freedom)
    return [
        Bias(normal_deviate(tail), float(s), float(e), name, number, kind, step)
        for number, (tail, s, e, name) in enumerate(zip(tails, shift, error, names, strict=True))
    ]


def _slopes(subject: Subject, law: Oracle, key: str, step: int, exact: bool) -> dict[str, float]:
    """How the gradient of each kind of rows grows with an error of one output in every call.

    Where such an error is not pulled back, the targets of these rows are other rows, as those of
    Shortcut's longer steps are its shorter ones; then it is the slope for exact targets, which is 2
    for an unweighted squared error.
    """
    if exact and law is MIXTURE:  # with labels, which an objective may ask for
        subject, law = replace(subject, needs_labels=True), GAUSSIAN
    everywhere = _rise(subject, law, key, step, exact, everywhere=True)
    if all(slope > 0 for slope in everywhere.values()):
        return everywhere
    held = _rise(subject, law, key, step, exact, everywhere=False)
    chosen = {kind: s if s > 0 else abs(held.get(kind, 0)) for kind, s in everywhere.items()}
    return {kind: slope if slope > ROUNDING else 1.0 for kind, slope in chosen.items()}


def _rise(
    subject: Subject, law: Oracle, key: str, step: int, exact: bool, *, everywhere: bool
) -> dict[str, float]:
    network = subject.exact_network(law, exact=exact)
    batch, ends = subject.batch_of(law, SLOPE_ROWS[law], 0, step), []
    for eps in (EPS, -EPS):
        net, average = (Shifted(network, key, eps, everywhere=everywhere) for _ in range(2))
        following = average if everywhere else None
        objective = _objective(subject, law, exact=exact, teacher=network, average=following)
        ends.append(slopes_in(subject.loss(objective, net, batch), net.bias))
    return {
        kind: (slope - ends[1][kind]) / (2 * EPS)
        for kind, slope in ends[0].items()
        if kind in ends[1]
    }
