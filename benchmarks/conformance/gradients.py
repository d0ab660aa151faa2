"""Where the gradient of an objective goes: to every head, and not through targets.

A loss ||p - sg T||^2 is differentiated through its prediction p alone. `Tapped` adds zero leaves to
every evaluation of the network. No gradient may reach a leaf that only derivatives see, unless
`differentiates` names the derivative, or run through the input of an evaluation that comes from
another one, unless it names the input. What it names must be differentiated in some form. No second
derivative may join the leaves of two evaluations, or of two rows of one evaluation that are in
different groups.

Two evaluations may be joined by a declared input: an error in the first then moves the second, as
in a map of two steps, and both errors add up. Where they cancel, the second is a target that is
compared with the first, and it must be without gradient, unless `differentiates` names the target.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from backbones.mlp import MLP
from backbones.network import build_network
from benchmarks.conformance.networks import NUM_CLASSES, Evaluation, Tapped, Toy
from benchmarks.conformance.results import Broken, ClaimResult, held, note
from benchmarks.conformance.subject import STEPS, OnToy, Subject
from registry.protocols import Network

NO_GRADIENT = "evaluate targets through a teacher or under torch.no_grad(), and .detach() them"
IF_MEANT = '; declare differentiates = ("{}",) if it is meant'


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
    evaluations, used = 0, set[str]()
    for form, exact in subject.variants():
        for step in form.stages(exact=exact):
            seen = [_Seen.of(form, step, exact=exact, itself=itself) for itself in (False, True)]
            # A teacher's own weights may be frozen. Those of the network in its place are not.
            for one in seen[:1] if "input" in subject.differentiates else seen:
                one.check()
                evaluations, used = max(evaluations, len(one.net.calls)), used | one.used()
    if idle := ", ".join(sorted(set(subject.differentiates) - used)):
        if not getattr(subject.make(), "differentiates", ()):  # full_gradient names what it may be
            return note(f"it differentiates no {idle}, which full_gradient stands for")
        raise Broken(
            f"no gradient runs through any {idle}, which `differentiates` names",
            "find a .detach() or a no_grad() too many, or let `differentiates` name what is meant",
        )
    through = f", through {', '.join(sorted(used))}" if used else ""
    return held(f"{evaluations} evaluations{through}")


@dataclass(frozen=True)
class _Seen:
    """A loss, the evaluations of the network and those of a teacher that is another network."""

    per_sample: Tensor
    net: Tapped
    teacher: Tapped
    subject: Subject

    @classmethod
    def of(cls, subject: Subject, step: int, *, exact: bool, itself: bool) -> _Seen:
        """With the network in training as its own teacher, or with another one."""
        keys = subject.exact_keys if exact else subject.keys
        n = max(12, 4 * subject.group)  # several groups, of which none may reach another
        batch = subject.batch(n=n, step=step, labels="given")
        net, other = (Tapped(Toy((2,), keys, seed=seed), len(batch)) for seed in (0, 1))
        objective = subject.objective(exact=exact, teacher=net if itself else other)
        net.requires_grad_()
        return cls(subject.loss(objective, net, batch).per_sample, net, other, subject)

    def check(self) -> None:
        allowed = self.subject.differentiates
        if self._through_derivatives() and "derivative" not in allowed:
            raise Broken(
                "the gradient runs through a derivative of the network",
                NO_GRADIENT + IF_MEANT.format("derivative"),
            )
        if self._through_inputs() and "input" not in allowed:
            raise Broken(
                "the gradient runs through the input of an evaluation, which comes from another",
                NO_GRADIENT + IF_MEANT.format("input"),
            )
        self._check_evaluations()
        if any(self._reached(self.teacher.parameters())):
            raise Broken("the teacher's network gets a gradient", NO_GRADIENT)

    def used(self) -> set[str]:
        """What the gradient runs through, of that which can be declared."""
        found = {
            "derivative": self._through_derivatives(),
            "input": self._through_inputs(),
            "target": "target" in self.subject.differentiates and bool(self._compared()),
        }
        return {way for way, is_used in found.items() if is_used}

    def _through_derivatives(self) -> bool:
        calls = [*self.net.calls, *self.teacher.calls]
        return any(self._reached(leaf for call in calls for leaf in call.slope.values()))

    def _through_inputs(self) -> bool:
        """Whether it runs through an input that depends on another evaluation."""
        return any(
            call.entry is not None and any(self._reached([call.entry])) and self._comes_from(call)
            for call in [*self.net.calls, *self.teacher.calls]
        )

    def _comes_from(self, call: Evaluation, values: Iterable[Tensor] = ()) -> bool:
        """Whether the input of a call depends on these values of others; on any by default."""
        if call.given is None or is_functorch_wrapped_tensor(call.given):
            return False
        if not call.given.requires_grad:
            return False
        values = values or [leaf for one in self.net.calls for leaf in one.value.values()]
        return any((g != 0).any() for g in _gradients(call.given.sum(), values))

    def _check_evaluations(self) -> None:
        """No gradient joins two evaluations that are compared, or rows of different groups."""
        if "target" not in self.subject.differentiates and (pair := self._compared()):
            raise Broken(
                f"the gradient runs through two evaluations of the network (call {pair[0] + 1} "
                f"and call {pair[1] + 1} of {len(self.net.calls)}) that are compared with each "
                "other",
                NO_GRADIENT + IF_MEANT.format("target"),
            )
        for i, call, half, marked in self._slopes():
            coupled = _gradients(marked, list(call.value.values()))
            if not self.subject.couples_rows and any((c[~half] != 0).any() for c in coupled):
                raise Broken(
                    f"the gradient runs through two rows of call {i + 1} that are compared with "
                    "each other",
                    NO_GRADIENT,
                )

    def _compared(self) -> tuple[int, int] | None:
        """The numbers of two evaluations with gradient that are compared, if there are any."""
        for i, call, half, marked in self._slopes():
            for j, other in enumerate(self.net.calls):
                curvature = _gradients(marked, list(other.value.values()))
                joined = any((c != 0).any() for c in curvature)
                if i != j and joined and not self._adds_up(call, other, curvature, half):
                    return i, j
        return None

    def _slopes(self) -> Iterator[tuple[int, Evaluation, Tensor, Tensor]]:
        """For each evaluation that the loss depends on: its number, some rows, and its slope there.

        The slope is the sum of the loss's gradient in its outputs in one half of its groups of
        rows, and must not depend on anything else.
        """
        rng = torch.Generator().manual_seed(0)
        for i, call in enumerate(self.net.calls):
            own = list(call.value.values())
            if not own:
                continue
            group = self.subject.group if len(own[0]) % self.subject.group == 0 else 1
            half = torch.rand(len(own[0]) // group, generator=rng) < 0.5
            half = half.repeat_interleave(group)
            slopes = torch.autograd.grad(
                *(self.per_sample.sum(), own),
                create_graph=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            marked = torch.stack([(slope * half).sum() for slope in slopes]).sum()
            if marked.requires_grad:
                yield i, call, half, marked

    def _adds_up(
        self, one: Evaluation, other: Evaluation, curvature: list[Tensor], half: Tensor
    ) -> bool:
        """Whether one is the input of the other, by declaration, and errors of both add up."""
        if "input" not in self.subject.differentiates:
            return False
        is_input = self._comes_from(one, list(other.value.values())) or self._comes_from(
            other, list(one.value.values())
        )
        return is_input and float(sum(c[half].sum() for c in curvature)) > 0

    def _reached(self, leaves: Iterable[Tensor]) -> list[bool]:
        return [bool((g != 0).any()) for g in _gradients(self.per_sample.sum(), leaves)]


def _gradients(value: Tensor, leaves: Iterable[Tensor]) -> list[Tensor]:
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    if not (leaves and value.requires_grad):
        return []
    return list(
        torch.autograd.grad(
            value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def _backward(toy: OnToy, net: Network, dtype: torch.dtype) -> None:
    for step in STEPS:
        batch = toy.subject.batch(n=16, step=step, labels="given", dtype=dtype)
        toy(batch, seed=step, net=net).per_sample.mean().backward()


def _size(parameters: Iterable[nn.Parameter]) -> float:
    return sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
