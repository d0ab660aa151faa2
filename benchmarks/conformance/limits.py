"""Claims about the zoo's own objectives in their limits, such as the floor of a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.fixed_point import inapplicable
from benchmarks.conformance.networks import Toy
from benchmarks.conformance.results import Broken, Claim, ClaimResult, compared, declared
from benchmarks.conformance.subject import GAUSSIAN, Subject, gradients, law_batch, random_batch
from registry.protocols import Cond, Network
from zoo.objectives.flow_matching import FlowMatching
from zoo.ops import mean_flat, sum_flat
from zoo.paths import Linear
from zoo.points.velocities import Conditional
from zoo.residuals import Exact, Rcgm
from zoo.times import LogitNormalPair
from zoo.weighting import Unweighted

ROWS = 20_000


def flow_matching_floor(subject: Subject) -> ClaimResult:
    """Var(v_c | x_t) = s^2 / S_t^2 per element: s pi / 2 for uniform times."""
    return _floor(subject, lambda t, r: mean_flat(_variance(t)))


def mean_flow_floor(subject: Subject) -> ClaimResult:
    """s^2 S_r^2 / S_t^4, summed over elements."""

    def floor(t: Tensor, r: Tensor) -> Tensor:
        return sum_flat(
            _variance(t) * GAUSSIAN.marginal_variance(r) / GAUSSIAN.marginal_variance(t)
        )

    return _floor(subject, floor)


def mean_flow_on_the_diagonal(subject: Subject) -> ClaimResult:
    """With r = t in every row, MeanFlow has the gradient of flow matching."""
    if reason := _other_velocity(subject):
        return declared(reason)
    times = LogitNormalPair(off_diagonal_fraction=0.0)
    objective = replace(subject.objective(exact=True), times=times)
    reference = FlowMatching(times=times, path=objective.path)
    return compared(
        "relative error",
        _gradient_error(subject, objective, reference),
        1e-12,
        "with r = t the gradient differs from that of flow matching",
        "the target of a row with r = t is the conditional velocity",
    )


def shortcut_at_small_steps(subject: Subject) -> ClaimResult:
    """Without bootstrap, at its smallest step, Shortcut has the gradient of flow matching."""
    net = Toy((2,), subject.keys)
    made = subject.objective(exact=True, teacher=net)
    objective = replace(made, bootstrap_fraction=0.0, num_steps=2**14)
    out = subject.loss(objective, net, random_batch(n=64))
    assert out.t is not None
    reference = FlowMatching(times=_Given(out.t), path=objective.path)
    return compared(
        "relative error",
        _gradient_error(subject, objective, reference),
        1e-3,
        "at steps of 2^-14 the gradient differs from that of flow matching",
        "the anchor regresses the conditional velocity at t - r = 1 / num_steps",
    )


def rcgm_tends_to_the_derivative(subject: Subject) -> ClaimResult:
    """With one step the gradient is exact to first order in delta, also where t - r < delta."""
    itself = Toy((2,), subject.keys)  # the network of `_gradient_error`
    objective = replace(subject.objective(teacher=itself), clip=torch.inf)
    if not isinstance(objective.residual, Rcgm):
        return declared("no finite-difference residual")
    if hasattr(objective, "weight"):  # it bends an error that is linear in delta
        objective = replace(objective, weight=Unweighted())
    exact = replace(objective, residual=Exact())
    errors = []
    for delta in (2e-3, 1e-3):
        finite = replace(objective, residual=replace(objective.residual, order=1, delta=delta))
        errors.append(_gradient_error(subject, finite, exact, own=True))
    ratio = errors[0] / max(errors[1], 1e-300)
    if not 1.6 < ratio < 2.4:
        raise Broken(
            f"halving delta divides the error by {ratio:.2f} instead of 2",
            "step and divide by the same t - m, m = max(t - delta, r)",
        )
    return compared(
        "relative error",
        errors[1],
        0.05,
        "the finite-difference residual does not tend to the derivative",
        "step and divide by the same t - m, m = max(t - delta, r)",
    )


def rcgm_order_at_the_truth(subject: Subject) -> ClaimResult:
    """Composing the exact flow map is exact, so the residual does not depend on the order."""
    if not isinstance(subject.objective().residual, Rcgm):
        return declared("no finite-difference residual")
    network, rms = subject.exact_network(GAUSSIAN, exact=False), []
    for order in (1, 2, 4):
        objective = subject.objective(teacher=network)
        objective = replace(objective, residual=replace(objective.residual, order=order))
        out = subject.loss(objective, network, law_batch(GAUSSIAN, 256, 0))
        rms.append(out.diagnostics["residual_rms"])
    change = max(float((rms[0] - other).abs().max()) for other in rms[1:])
    return compared(
        "change",
        change,
        1e-3,  # float32 times over delta = 0.01
        "at the exact solution the residual depends on the number of teacher steps",
        "the teacher's steps must divide [r, m] evenly and start where m is",
    )


def every_end_of_decm(subject: Subject) -> ClaimResult:
    """Both residuals of DE-CM vanish at the truth for every lam and gamma."""
    network, largest = subject.exact_network(GAUSSIAN), 0.0
    for lam, gamma in ((0.5, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (2.0, 0.3)):
        made = subject.make()
        objective = subject.edit(replace(made, lam=lam, gamma=gamma))
        if getattr(objective.teacher, "distils", False):
            objective.teacher.attach(network)
        out = subject.loss(objective, network, law_batch(GAUSSIAN, 256, 0))
        for name in ("consistency", "n2n"):
            largest = max(largest, float(out.terms[name].max()) ** 0.5)
    return compared(
        "residual",
        largest,
        1e-5,  # float32 times
        "a residual does not vanish at the exact solution",
        "du runs along (gamma v1, gamma, -lam), with lam v2 at the end that the network predicts",
    )


OF_RCGM: dict[str, Claim] = {
    "rcgm tends to the derivative": rcgm_tends_to_the_derivative,
    "order changes nothing at the truth": rcgm_order_at_the_truth,
}
SPECIAL: dict[str, dict[str, Claim]] = {
    "flow_matching": {"loss floor": flow_matching_floor},
    "mean_flow": {
        "loss floor": mean_flow_floor,
        "flow matching at r = t": mean_flow_on_the_diagonal,
    },
    "shortcut": {"flow matching at small steps": shortcut_at_small_steps},
    "dumo": OF_RCGM,
    "recursive_consistency": OF_RCGM,
    "twin_flow": OF_RCGM,
    "decm": {"residuals vanish for every lam, gamma": every_end_of_decm},
}


@dataclass(frozen=True)
class _Given:
    """A time law that returns the times it was given, with r = t."""

    t: Tensor

    def __call__(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.t, self.t

    def num_off_diagonal(self, n: int) -> int:
        return 0


def _other_velocity(subject: Subject) -> str:
    """Why this does not hold, where targets are not the conditional velocity alone; "" if so."""
    if isinstance(getattr(subject.make(), "velocity", None), Conditional):
        return ""
    return "it is that of the conditional velocity"


def _variance(t: Tensor) -> Tensor:
    """Var(v_c | x_t), which does not depend on x_t."""
    return GAUSSIAN.posterior_variance(GAUSSIAN.marginal_mean(t), t)


def _floor(subject: Subject, floor: Callable[[Tensor, Tensor], Tensor]) -> ClaimResult:
    """The mean loss at the truth is the floor, no more and no less."""
    if reason := inapplicable(subject) or _other_velocity(subject):
        return declared(reason)
    if not isinstance(getattr(subject.make(), "path", None), Linear):
        return declared("the floor is that of the linear path")
    network = subject.exact_network(GAUSSIAN)
    objective = subject.objective(exact=True, teacher=network)
    out = subject.loss(objective, network, law_batch(GAUSSIAN, ROWS, 0))
    assert out.t is not None
    assert out.r is not None
    excess = out.per_sample.detach() - floor(out.t, out.r)
    z = float(excess.mean().abs() / (excess.std() / ROWS**0.5))
    return compared(
        f"{float(out.per_sample.mean()):.3f}, z",
        z,
        4.0,
        f"the loss at the truth is {float(out.per_sample.mean()):.3f}, and its floor "
        f"{float(floor(out.t, out.r).mean()):.3f}",
        "it is the mean squared error to the conditional target, without further factors",
    )


def _gradient_error(
    subject: Subject, objective: Any, reference: Any, *, own: bool = False
) -> float:
    """The relative difference of the gradients of the objective and of the reference.

    A reference that has the `own` outputs of the objective must agree in size too. Any other reads
    "v" where the objective has "u", and agrees up to a factor.
    """
    batch = random_batch(n=64)
    found = []
    for one in (objective, reference):
        net = Toy((2,), subject.keys)
        seen = net if own or one is objective else _as_velocity(net)
        per_sample = subject.loss(one, seen, batch).per_sample
        gradient = gradients(per_sample, list(net.parameters()))
        found.append(torch.cat([g.flatten() for g in gradient]))
    one, other = found if own else [g / g.norm() for g in found]
    return float((one - other).norm() / other.norm())


def _as_velocity(net: Network) -> Network:
    def velocity(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
        return {"v": net(x, t, r, cond)["u"]}

    return velocity
