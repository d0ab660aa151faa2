"""Whether an error of a prediction is pushed back: the sign of the loss's slope beside the truth.

The slope is taken in a trainable addition to an output that is off by +-eps, and its rise from -eps
to eps is compared with its spread over batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from scipy import stats
from torch import nn

from benchmarks.conformance.expected.kinds import ALL
from benchmarks.conformance.expected.moments import EPS, normal_deviate, slopes_in
from benchmarks.conformance.networks import Shifted, Tapped
from benchmarks.conformance.subject import GAUSSIAN, Subject

LIMIT = 4.0  # standard errors
ROWS = 256
ROUNDING = 1e-12


@dataclass(frozen=True)
class Pull:
    """How surely the loss falls towards the truth for an error in one output."""

    key: str
    kind: str
    z: float
    step: int
    diagonal: bool | None = None  # at r = t or at r < t; None is both
    followed: bool = False  # whether the other outputs had to follow the error


def pulls(subject: Subject) -> Iterator[Pull]:
    """For each call with gradient, output, side of the diagonal and kind of rows: a slope.

    The error is at the points of that call alone, so that targets are exact; if the loss does not
    fall there, it may be written as u - sg[u - g] with g from other points: then the error is in
    all calls.
    If it does not change there either, g may come from another output that learns from u: then that
    output follows.
    """
    network = subject.exact_network(GAUSSIAN)
    objective = subject.objective(exact=True, teacher=network)
    for step in subject.stages(exact=True):
        tapped = Tapped(network, ROWS)
        subject.loss(objective, tapped, subject.batch_of(GAUSSIAN, ROWS, step, step))
        calls = {i: call for i, call in enumerate(tapped.calls) if call.with_gradient}
        for i, key, diagonal in itertools.product(calls, subject.exact_outputs, (False, True)):
            if not ((calls[i].t == calls[i].r) == diagonal).any():
                continue
            erring = partial(Shifted, key=key, call=i, diagonal=diagonal)
            rises = _surest_rises(subject, partial(erring, network), step, (False, True), i)
            if follows := not rises:
                followed = _followed(subject, network, erring, key, step)
                rises = _surest_rises(subject, followed, step, (True,))
            for kind, z in rises.items():
                yield Pull(key, kind, z, step, diagonal, followed=follows)


def pulls_of_all_calls(subject: Subject, found: Collection[Pull]) -> Iterator[Pull]:
    """For each output and stage of these pulls: the slope for an error in all calls, targets too.

    A target that is nearer to the data than its prediction has less of a constant error in u, as
    X(x, t, r) = x - (t - r) u has less of it. One that is further away has more, and the error
    grows.
    """
    network = subject.exact_network(GAUSSIAN)
    for step, key in dict.fromkeys((p.step, p.key) for p in found if not p.followed):
        slopes = []
        for seed in range(8):
            batch, ends = subject.batch_of(GAUSSIAN, ROWS, seed, step), []
            for eps in (EPS, -EPS):
                net, average = (Shifted(network, key, eps, everywhere=True) for _ in range(2))
                objective = subject.objective(exact=True, teacher=network, average=average)
                ends.append(slopes_in(subject.loss(objective, net, batch, seed), net.bias)[ALL])
            slopes.append((ends[0], ends[1]))
        if _largest(slopes) > ROUNDING:
            yield Pull(key, ALL, _rise(slopes), step)


def pulls_of_a_law(subject: Subject) -> Iterator[Pull]:
    """For each output and kind of rows: a slope, with the error in all calls.

    It moves the law of what the network makes, which must be pulled back to that of the data.
    """
    network = subject.exact_network(GAUSSIAN)
    for step in subject.stages(exact=True):
        for key in subject.exact_outputs:
            erring = partial(Shifted, network, key=key)
            for kind, z in _surest_rises(subject, erring, step, (True,)).items():
                yield Pull(key, kind, z, step)


def _followed(
    subject: Subject, network: nn.Module, erring: Callable[..., Shifted], key: str, step: int
) -> Callable[..., Shifted]:
    """The network with the error, where all other outputs are shifted to their new optimum."""
    objective = subject.objective(exact=True, teacher=network)
    batch = subject.batch_of(GAUSSIAN, 4 * ROWS, 0, step)

    def rise(ends: list[Shifted]) -> float:
        high, low = (slopes_in(subject.loss(objective, net, batch), net.bias)[ALL] for net in ends)
        return high - low

    shifts = {}
    for other in set(subject.exact_outputs) - {key}:
        wrong = (erring(network, eps=eps, everywhere=True) for eps in (EPS, -EPS))
        moved = rise([Shifted(net, other, 0.0) for net in wrong])
        steep = rise([Shifted(network, other, eps) for eps in (EPS, -EPS)])
        shifts[other] = -moved / steep if steep else 0.0

    def shifted(eps: float, everywhere: bool, at: None) -> Shifted:
        net = network
        for other, shift in shifts.items():
            net = Shifted(net, other, shift * eps, everywhere=True)
        return erring(net, eps=eps, everywhere=everywhere, at=at)

    return shifted


def _surest_rises(
    subject: Subject,
    erring: Callable[..., Shifted],
    step: int,
    places: tuple[bool, ...],
    call: int = 0,
) -> dict[str, float]:
    """`_rises`, in the first of the places where every kind is clear.

    More batches are drawn until it is, or until some kind rises the other way in all places.
    """
    rises: dict[str, float] = {}
    for num_batches in (8, 32, 128):
        wrong = []
        for everywhere in places:
            rises = _rises(subject, erring, step, num_batches, None if everywhere else call)
            if all(z > LIMIT for z in rises.values()):
                return rises
            wrong.append(min(rises.values()) < -LIMIT)
        if all(wrong):
            break
    return rises


def _rises(
    subject: Subject, erring: Callable[..., Shifted], step: int, num_batches: int, call: int | None
) -> dict[str, float]:
    """How many standard errors the slope of each kind's loss rises from -eps to eps.

    The error is at the points of a call, or everywhere. Kinds whose slope stays 0 but for rounding,
    or that few batches have, are left out.
    """
    network = subject.exact_network(GAUSSIAN)
    objective = subject.objective(exact=True, teacher=network)
    slopes: dict[str, list[tuple[float, float]]] = {}
    for seed in range(num_batches):
        batch, ends, at = subject.batch_of(GAUSSIAN, ROWS, seed, step), [], None
        if call is not None:
            subject.loss(objective, seen := Tapped(network, ROWS), batch, seed)
            at = seen.calls[call]
        for eps in (EPS, -EPS):
            net = erring(eps=eps, everywhere=call is None, at=at)
            ends.append(slopes_in(subject.loss(objective, net, batch, seed), net.bias))
        for kind in ends[0].keys() & ends[1].keys():
            slopes.setdefault(kind, []).append((ends[0][kind], ends[1][kind]))
    enough = {kind: pairs for kind, pairs in slopes.items() if 2 * len(pairs) >= num_batches}
    return {kind: _rise(pairs) for kind, pairs in enough.items() if _largest(pairs) > ROUNDING}


def _largest(pairs: list[tuple[float, float]]) -> float:
    return max(abs(slope) for pair in pairs for slope in pair)


def _rise(slopes: list[tuple[float, float]]) -> float:
    """How many standard errors a slope rises from the second of two values to the first."""
    changes = [high - low for high, low in slopes]
    change = torch.tensor(changes, dtype=torch.float64)
    error = (change.std() / len(change) ** 0.5).clamp_min(ROUNDING)
    t = float(change.mean() / error)
    return math.copysign(normal_deviate(stats.t.logsf(abs(t), len(change) - 1)), t)
