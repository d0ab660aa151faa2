"""Where the gradient of an objective goes: to every head, and not through targets.

A loss ||p - sg T||^2 is differentiated through its prediction p alone. `Tapped` adds zero leaves to
every evaluation of the network. No gradient may reach a leaf that only derivatives see, and no
second derivative may join the leaves of two evaluations, or of two rows of one evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from backbones.mlp import MLP
from backbones.network import build_network
from benchmarks.conformance.networks import NUM_CLASSES, Tapped, Toy
from benchmarks.conformance.results import Broken, ClaimResult, declared, held
from benchmarks.conformance.subject import STEPS, OnToy, Subject, random_batch
from registry.protocols import Network

NO_GRADIENT = (
    "evaluate targets through a teacher or under torch.no_grad(), and .detach() them; "
    "declare full_gradient = True if it is meant"
)


def reaches_every_head(subject: Subject) -> ClaimResult:
    """Every output of a network, and every head of the MLP that is built for it, is trained."""
    toy = subject.on_toy()
    _backward(toy, toy.net, torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = functools.partial(MLP, dim=8, depth=1)
        real = build_network(mlp, (2,), NUM_CLASSES, subject.keys)
        for parameter in real.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    _backward(toy, real, torch.float32)
    sizes = {f"the output {key!r}": _size([weight]) for key, weight in toy.net.outer.items()}
    sizes |= {f"the head {name!r}": _size(head.parameters()) for name, head in real.heads.items()}
    dead = [name for name, size in sizes.items() if not size > 0]
    if dead:
        raise Broken(
            f"no gradient reaches {', '.join(dead)}",
            "train every output in `heads`, or take it out of `heads`",
        )
    return held(", ".join(subject.keys), min(sizes.values()))


def not_through_targets(subject: Subject) -> ClaimResult:
    """No gradient runs through a target (see the module), or into the network of a teacher."""
    if subject.full_gradient:
        return declared("full_gradient")
    evaluations = 0
    for step in STEPS[:2]:
        batch = random_batch(n=12, step=step, labels="given")
        own, teacher = Toy((2,), subject.keys), Toy((2,), subject.keys, seed=1)
        for itself in (True, False):
            net = Tapped(own, 12)
            objective = subject.objective(teacher=net if itself else teacher)
            per_sample = subject.loss(objective, net, batch).per_sample
            evaluations = max(evaluations, len(net.calls))
            _check_derivatives(per_sample, net)
            _check_evaluations(per_sample, net, subject.couples_rows)
            if any(_reached(per_sample, teacher.parameters())):
                raise Broken("the teacher's network gets a gradient", NO_GRADIENT)
    return held(f"{evaluations} evaluations")


def _check_derivatives(per_sample: Tensor, net: Tapped) -> None:
    slopes = [leaf for call in net.calls for leaf in call.slope.values()]
    if any(_reached(per_sample, slopes)):
        raise Broken("the gradient runs through a derivative of the network", NO_GRADIENT)


def _check_evaluations(per_sample: Tensor, net: Tapped, couples_rows: bool) -> None:
    """The loss's gradient in one half of one evaluation must not depend on anything else."""
    values = [list(call.value.values()) for call in net.calls]
    leaves = [leaf for call in values for leaf in call]
    rng = torch.Generator().manual_seed(0)
    for i, call in enumerate(values):
        if not call:
            continue
        slopes = torch.autograd.grad(
            per_sample.sum(), call, create_graph=True, allow_unused=True, materialize_grads=True
        )
        half = torch.rand(len(call[0]), generator=rng) < 0.5
        marked = torch.stack([(slope * half).sum() for slope in slopes]).sum()
        if not marked.requires_grad:
            continue
        curvature = torch.autograd.grad(
            marked, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        own = [any(leaf is other for other in call) for leaf in leaves]
        if any((c != 0).any() for c, is_own in zip(curvature, own, strict=True) if not is_own):
            raise Broken(
                f"the gradient runs through two evaluations of the network (call {i + 1} of "
                f"{len(values)} and another) that are compared with each other",
                NO_GRADIENT,
            )
        same = [c for c, is_own in zip(curvature, own, strict=True) if is_own]
        if not couples_rows and any((c[~half] != 0).any() for c in same):
            raise Broken(
                f"the gradient runs through two rows of call {i + 1} that are compared with "
                "each other",
                NO_GRADIENT,
            )


def _reached(per_sample: Tensor, inputs: Iterable[Tensor]) -> list[bool]:
    leaves = [leaf for leaf in inputs if leaf.requires_grad]
    if not leaves:
        return []
    found = torch.autograd.grad(per_sample.sum(), leaves, retain_graph=True, allow_unused=True)
    return [g is not None and bool((g != 0).any()) for g in found]


def _backward(toy: OnToy, net: Network, dtype: torch.dtype) -> None:
    for step in STEPS:
        batch = random_batch(n=16, step=step, labels="given", dtype=dtype)
        toy(batch, seed=step, net=net).per_sample.mean().backward()


def _size(parameters: Iterable[nn.Parameter]) -> float:
    return sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
