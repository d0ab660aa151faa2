"""Which claims reject which planted mistake (mutations.py).

A mistake that leaves every loss and gradient bit-equal has no effect: the objective does not use
the part, or uses it where the mistake makes no difference. No claim can reject such a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.conformance.mutations import MUTATIONS, RECOMBINED, Mutation
from benchmarks.conformance.networks import Toy
from benchmarks.conformance.results import Claim, run_claim
from benchmarks.conformance.subject import STEPS, Subject, gradients


@dataclass(frozen=True)
class Verdict:
    """Which claims reject a mutation; a mutation without effect cannot be rejected."""

    mutation: str
    killed_by: tuple[str, ...]
    no_effect: bool = False

    @property
    def survived(self) -> bool:
        return not self.killed_by and not self.no_effect


def verdicts(subject: Subject, claims: dict[str, Claim]) -> Iterator[Verdict]:
    """One verdict for each mutation that the objective has a part for."""
    for mutation in MUTATIONS:
        found = verdict(mutation, subject, claims)
        if found is not None:
            yield found


def verdict(mutation: Mutation, subject: Subject, claims: dict[str, Claim]) -> Verdict | None:
    """The verdict on the mutation; None where the objective has no such part."""
    planted = mutation.plant(subject)
    if planted is None:
        return None
    # A mistake in a sampler changes no loss, so equal losses do not excuse it.
    if mutation.name != RECOMBINED and not _has_effect(subject, planted):
        return Verdict(mutation.name, (), no_effect=True)
    failed = [n for n, c in claims.items() if run_claim(n, c, planted).status == "FAIL"]
    return Verdict(mutation.name, tuple(failed))


def _has_effect(subject: Subject, planted: Subject) -> bool:
    """Whether the mistake changes any loss or gradient."""
    for (one, exact), (other, _) in zip(subject.variants(), planted.variants(), strict=True):
        for step in STEPS:
            before, after = (_loss_and_gradient(s, exact, step) for s in (one, other))
            if not torch.equal(before, after):
                return True
    return False


def _loss_and_gradient(subject: Subject, exact: bool, step: int) -> Tensor:
    keys = subject.exact_keys if exact else subject.keys
    net, teacher = Toy((2,), keys, seed=0), Toy((2,), keys, seed=1)
    objective = subject.objective(exact=exact, teacher=teacher)
    batch = subject.batch(n=32, step=step, labels="given")
    per_sample = subject.loss(objective, net, batch, step).per_sample
    gradient = gradients(per_sample, list(net.parameters()))
    return torch.cat([per_sample.detach(), *(g.flatten() for g in gradient)])
