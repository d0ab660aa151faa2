"""The exact solution must be a fixed point that errors are pulled back to, in expectation.

The network is an oracle with trainable additions that are zero (`WithMoments`). Their mean gradient
is the moment of the loss's slope with smooth functions of (x, t, r) and the label, and it is zero
at a fixed point. Means over blocks of rows are compared with the spread of the blocks; "z" is
Student's t, turned into the normal deviate of equal probability. The mean gradient divided by the
slope of the slope is the shift of the optimum in units of velocity, so an error does
not pass because the loss is small. All of this is done for each kind of rows (subject.py), so
an error in few rows does not pass either.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor

from benchmarks.conformance.networks import VELOCITIES, Shifted, Tapped, WithMoments
from benchmarks.conformance.results import Broken, ClaimResult, declared, held, note
from benchmarks.conformance.subject import (
    ALL,
    GAUSSIAN,
    MIXTURE,
    STEPS,
    Subject,
    gradients,
    law_batch,
    losses_by_kind,
)
from registry import samplers
from registry.protocols import LossOutput, Network
from registry.sampling import MAPS, needed_by
from zoo.oracles import Oracle
from zoo.samplers import valid_samplers

BLOCKS = 24
ROWS = {GAUSSIAN: 1536, MIXTURE: 256}
LIMIT = 4.0  # standard errors
# Shifts below this come from arithmetic: float32 times, and the error of the mixture's flow map.
FLOOR = {GAUSSIAN: 1e-5, MIXTURE: 1e-4}
EPS = 0.1

NOT_FIXED = (
    "see which term is wrong with a sign or tangent changed (t=0 data, t=1 noise, x_r = x_t - "
    "(t-r) u). If a weight, clip or finite step biases it by design, name the fields that make it "
    "exact in exact_with; if it holds for distributions alone, set fixed_point"
)


@dataclass(frozen=True)
class Bias:
    """The largest of the mean gradients at the exact solution."""

    z: float  # in standard errors
    shift: float  # of the optimum, in units of velocity
    error: float  # its standard error
    output: str
    kind: str = ALL


def at_gaussian(subject: Subject) -> ClaimResult:
    return _fixed(subject, GAUSSIAN)


def at_mixture(subject: Subject) -> ClaimResult:
    """The same at a law that is skewed given x_t, and with labels."""
    return _fixed(subject, MIXTURE)


def with_defaults(subject: Subject) -> ClaimResult:
    """For the record: how far the default fields move the optimum."""
    if reason := inapplicable(subject):
        return declared(reason)
    changes = subject.exact_with()
    if not changes:
        return note("as above: the defaults are exact")
    found = measure(subject, MIXTURE, exact=False)
    names = ", ".join(changes)
    size = f"shift {found.shift:.1g} +- {found.error:.1g}"
    return note(f"z {found.z:.1f}: {size}, exact with other {names}", found.z)


def pulled_back(subject: Subject) -> ClaimResult:
    """A prediction that is off by +-eps, while its targets are exact, is pushed back."""
    if reason := inapplicable(subject):
        return declared(reason)
    found = list(_pulls(subject))
    for key in subject.velocity_keys:
        if not any(pull.key == key for pull in found):
            raise Broken(f"an error in {key!r} changes no gradient", "train it in every batch")
    for pull in found:
        if not pull.z > LIMIT:
            where = ("r = t" if pull.diagonal else "r < t") + _within(pull.kind)
            raise Broken(
                f"an error of {EPS} in {pull.key!r} at {where} is not pushed back: z {pull.z:.1f}",
                "the loss must fall towards the target: || prediction - sg target ||^2",
            )
    valid = valid_samplers(subject.make())
    needs_map = [n for n in valid if {*needed_by(samplers.get(n))} & {*MAPS}]
    if needs_map and not any(pull.key == "u" and not pull.diagonal for pull in found):
        raise Broken(
            f"u is trained at r = t alone, but the sampler {needs_map[0]!r} needs r < t",
            'train u at r < t, or declare trains = ("velocity",)',
        )
    weakest = min(pull.z for pull in found)
    num = sum(pull.kind == ALL for pull in found)
    return held(f"{num} predictions, z {weakest:.0f} > {LIMIT:.0f}", weakest, LIMIT)


def inapplicable(subject: Subject) -> str:
    """Why there is no pointwise fixed point to test; "" where there is one."""
    if subject.fixed_point != "pointwise":
        return f"fixed_point = {subject.fixed_point!r}"
    if subject.changes_coupling:
        return "a part couples data and noise, which changes the velocity"
    if not subject.velocity_keys:
        return "it trains neither u nor v"
    unknown = set(subject.make().heads) - set(VELOCITIES)
    return f"no exact {', '.join(sorted(unknown))} is known" if unknown else ""


def measure(
    subject: Subject, law: Oracle, *, exact: bool = True, blocks: int = BLOCKS, seed: int = 0
) -> Bias:
    """The largest, in standard errors, of the mean gradients in all moments of all outputs.

    Each kind of rows is weighed alone, if every block has rows of it.
    """
    network = subject.exact_network(law, exact=exact)
    outputs = subject.velocity_keys
    probe = WithMoments(network, law.shape[0], outputs)
    parameters: list[Tensor] = list(probe.parameters())
    objective = subject.objective(exact=exact, teacher=network)
    found: dict[str, list[Tensor]] = {}
    for block in range(blocks):
        batch = law_batch(law, ROWS[law], seed + block)
        out = subject.loss(objective, probe, batch, seed + block)
        for kind, loss in losses_by_kind(out):
            gradient = torch.cat([g.flatten() for g in gradients(loss, parameters, again=True)])
            found.setdefault(kind, []).append(gradient)
    names = [name.split(".")[1] for name, p in probe.named_parameters() for _ in range(p.numel())]
    slopes = {key: _slopes(subject, objective, network, law, key) for key in outputs}
    biases = []
    for kind, rows in found.items():
        if len(rows) == blocks and all(kind in slopes[key] for key in outputs):
            scale = torch.tensor([slopes[name][kind] for name in names], dtype=torch.float64)
            bias = _largest(torch.stack(rows) / scale, names, FLOOR[law])
            biases.append(replace(bias, kind=kind))
    # A nan is within no limit, so it is the largest.
    return max(biases, key=lambda bias: math.inf if math.isnan(bias.z) else bias.z)


def _fixed(subject: Subject, law: Oracle) -> ClaimResult:
    if reason := inapplicable(subject):
        return declared(reason)
    found = measure(subject, law)
    if LIMIT <= found.z < 2 * LIMIT:  # perhaps by chance; twice as many new rows decide
        found = measure(subject, law, blocks=2 * BLOCKS, seed=1000)
    changes = subject.exact_with()
    used = f", with other {', '.join(changes)}" if changes else ""
    size = f"shift {found.shift:.1g} +- {found.error:.1g}"
    if found.z < LIMIT:
        return held(f"z {found.z:.1f} < {LIMIT:.0f}: {size}{used}", found.z, LIMIT)
    return ClaimResult(
        status="FAIL",
        figure=f"z {found.z:.1f} >= {LIMIT:.0f}: {size}{used}",
        value=found.z,
        limit=LIMIT,
        reason=f"the exact solution is no fixed point: {found.output!r} is pulled off by about "
        f"{found.shift:.2g}{_within(found.kind)}",
        hint=NOT_FIXED,
    )


def _largest(gradient: Tensor, names: list[str], floor: float) -> Bias:
    """gradient [blocks parameters] in units of a shift; blocks of one step differ by chance."""
    mean, freedom = gradient.mean(0), len(gradient) - len(STEPS)
    by_step = gradient.unflatten(0, (-1, len(STEPS)))
    chance = (by_step - by_step.mean(0)).square().sum((0, 1)) / freedom
    error = (chance / len(gradient)).sqrt()
    shift = mean.abs()
    t = (shift - floor).clamp_min(0) / error.clamp_min(torch.finfo(error.dtype).tiny)
    worst = int(t.argmax())  # a nan in the gradient is found first, and no limit holds for it
    tail = stats.t.logsf(float(t[worst]), freedom)
    z = _normal_deviate(tail)
    return Bias(z, float(shift[worst]), float(error[worst]), names[worst])


def _normal_deviate(log_tail: float) -> float:
    """The z with P(N(0, 1) > z) = exp(log_tail), but at most 37."""
    return float(stats.norm.isf(math.exp(max(log_tail, -700.0))))


def _within(kind: str) -> str:
    return "" if kind == ALL else f", in {kind}"


def _slopes(
    subject: Subject, objective: object, network: Network, law: Oracle, key: str
) -> dict[str, float]:
    """How the gradient of each kind of rows grows with an error of one output.

    It is 2 for an unweighted squared error.
    """
    batch, ends = law_batch(law, ROWS[law], 0), []
    for eps in (EPS, -EPS):
        net = Shifted(network, key, eps=eps)
        out = subject.loss(objective, net, batch)
        ends.append(_slopes_in_bias(out, net.bias))
    return {
        kind: abs(end - ends[1][kind]) / (2 * EPS) or 1.0
        for kind, end in ends[0].items()
        if kind in ends[1]
    }


def _slopes_in_bias(out: LossOutput, bias: Tensor) -> dict[str, float]:
    return {
        kind: float(gradients(loss, [bias], again=True)[0]) for kind, loss in losses_by_kind(out)
    }


@dataclass(frozen=True)
class _Pull:
    key: str
    diagonal: bool
    kind: str
    z: float


def _pulls(subject: Subject) -> Iterator[_Pull]:
    """For each call with gradient, output, side of the diagonal and kind of rows: a slope.

    The error is in that call alone, so that targets are exact; if the loss does not fall there, it
    may be written as u - sg[u - g] with g from another call of u: then the error is in all calls.
    """
    network = subject.exact_network(GAUSSIAN)
    objective = subject.objective(exact=True, teacher=network)
    for phase in (0, len(STEPS) - 1):  # the seed of a batch chooses its step among STEPS
        tapped = Tapped(network, 8)
        subject.loss(objective, tapped, law_batch(GAUSSIAN, 8, phase))
        for call in [i for i, call in enumerate(tapped.calls) if call.with_gradient]:
            for key, diagonal in itertools.product(subject.velocity_keys, (False, True)):
                net = Shifted(network, key, call, diagonal)
                rises = _surest_rises(subject, objective, net, phase)
                for kind, z in rises.items():
                    yield _Pull(key, diagonal, kind, z)


def _surest_rises(
    subject: Subject, objective: object, net: Shifted, phase: int
) -> dict[str, float]:
    """`_rises`, with the error in all calls and over more batches until every kind is clear."""
    rises: dict[str, float] = {}
    for num_batches, everywhere in itertools.product((8, 32), (False, True)):
        shifted = replace(net, everywhere=everywhere)
        rises = _rises(subject, objective, shifted, phase, num_batches)
        if all(z > LIMIT for z in rises.values()):
            break
    return rises


def _rises(
    subject: Subject, objective: object, net: Shifted, phase: int, num_batches: int
) -> dict[str, float]:
    """How many standard errors the slope of each kind's loss rises from -eps to eps.

    Kinds whose slope stays 0, or that few batches have, are left out.
    """
    slopes: dict[str, list[tuple[float, float]]] = {}
    for seed in range(phase, phase + num_batches * len(STEPS), len(STEPS)):
        batch, ends = law_batch(GAUSSIAN, 256, seed), []
        for eps in (EPS, -EPS):
            shifted = replace(net, eps=eps, num_calls=0, bias=torch.zeros_like(net.bias))
            shifted.bias.requires_grad_()
            out = subject.loss(objective, shifted, batch, seed)
            ends.append(_slopes_in_bias(out, shifted.bias))
        for kind in ends[0].keys() & ends[1].keys():
            slopes.setdefault(kind, []).append((ends[0][kind], ends[1][kind]))
    enough = {kind: pairs for kind, pairs in slopes.items() if 2 * len(pairs) >= num_batches}
    return {kind: _rise(pairs) for kind, pairs in enough.items() if torch.tensor(pairs).any()}


def _rise(slopes: list[tuple[float, float]]) -> float:
    """How many standard errors a slope rises from the second of two values to the first."""
    changes = [high - low for high, low in slopes]
    change = torch.tensor(changes, dtype=torch.float64)
    error = (change.std() / len(change) ** 0.5).clamp_min(1e-12)
    t = float(change.mean() / error)
    return math.copysign(_normal_deviate(stats.t.logsf(abs(t), len(change) - 1)), t)
