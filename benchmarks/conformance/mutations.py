"""Mistakes to plant in an objective, the negative controls of the suite; verdicts.py judges them.

A mistake is a wrong part, such as a derivative along wrong tangents. It is put into every objective
that has a part of that kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.subject import Subject, is_derivative
from registry.protocols import Cond, Network, Teacher, parts
from zoo.derivatives.methods import Dual
from zoo.derivatives.one_pass import DerivativeOfU
from zoo.ops import like
from zoo.paths import Linear
from zoo.residuals import Rcgm
from zoo.samplers import Restart, jump, valid_samplers

Tangents = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Mutation:
    """A mistake; `plant` gives the subject with it, or None where there is no such part."""

    name: str
    plant: Callable[[Subject], Subject | None]


@dataclass(frozen=True)
class Turned(Dual):
    """A derivative along other tangents, times `sign`."""

    choose: Callable[[Tensor, Tensor, Tensor], Tangents]
    sign: int = 1

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        return self.sign * super().__call__(fn, primals, self.choose(*tangents))

    def with_graph(
        self,
        fn: Callable[..., Mapping[str, Tensor]],
        primals: Sequence[Tensor],
        tangents: Sequence[Tensor],
        key: str,
    ) -> tuple[dict[str, Tensor], Tensor]:
        out, derivative = super().with_graph(fn, primals, self.choose(*tangents), key)
        return out, self.sign * derivative


class Leaky(Dual):
    """A derivative that gradients run through."""

    def __call__(
        self, fn: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> Tensor:
        return torch.func.jvp(fn, tuple(primals), tuple(tangents))[1]


@dataclass
class Taught:
    """A teacher whose network is changed on the way, or which lets gradients through."""

    change: Callable[[Network], Network]
    inner: Teacher | None
    distils: bool
    needs_copy: bool

    def __call__(self, net: Network) -> Network:
        return self.change(net if self.inner is None else self.inner(net))

    def attach(self, network: torch.nn.Module) -> None:
        if self.inner is not None:
            self.inner.attach(network)

    def update(self, net: torch.nn.Module, step: int) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class WrongClamp(Rcgm):
    """A residual that divides by delta where the step was shorter, as the public code does."""

    def __call__(
        self,
        du_along: DerivativeOfU,
        teacher: Network,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        cond: Cond | None,
        u: Tensor,
        direction: Tensor,
    ) -> Tensor:
        g = super().__call__(du_along, teacher, x, t, r, cond, u, direction)
        share = (t - r).clamp_max(self.delta) / self.delta
        return like(share, x) * (g + direction) - direction


@dataclass(frozen=True, kw_only=True)
class Recombined(Restart):
    """A sampler that goes back to the noise that it started from, instead of fresh noise."""

    def __call__(self, net: Network, x1: Tensor, cond: Cond | None, rng: torch.Generator) -> Tensor:
        x, path = jump(net, x1, 1.0, 0.0, cond), self.path or Linear()
        for t in self.times()[1:]:
            noisy = path.sample(x, x1, torch.full((len(x),), t, dtype=x.dtype)).x_t
            x = jump(net, noisy, t, 0.0, cond)
        return x


def _tangents(choose: Callable[[Tensor, Tensor, Tensor], Tangents], sign: int = 1) -> Any:
    def plant(subject: Subject) -> Subject | None:
        return _with_parts(subject, is_derivative, lambda _: Turned(choose, sign))

    return plant


def _swapped_ends(subject: Subject) -> Subject | None:
    """DE-CM as one source prints it: tangents (lam v, lam, -gamma)."""
    made = subject.make()
    if not (hasattr(made, "lam") and hasattr(made, "gamma")):
        return None
    lam, gamma = made.lam, made.gamma

    def choose(a: Tensor, b: Tensor, c: Tensor) -> Tangents:
        if not c.any():
            return a, b, c
        return a * (lam / gamma), b * (lam / gamma), c * (gamma / lam)

    return _with_parts(subject, is_derivative, lambda _: Turned(choose))


def _gap_for_r(subject: Subject) -> Subject | None:
    if "u" not in subject.keys:
        return None

    def wrap(net: Network) -> Network:
        return lambda x, t, r, cond: net(x, t, t - r, cond)

    return replace(subject, wrap=wrap)


def _later_at_first(subject: Subject) -> Subject | None:
    """Every call of a teacher after its first has the first one's t, as if it forgot to move on."""

    def change(net: Network) -> Network:
        first: list[Tensor] = []

        def late(x: Tensor, t: Tensor, r: Tensor, cond: Cond | None) -> dict[str, Tensor]:
            first.append(t)
            return net(x, first[0], r, cond)

        return late

    return _with_parts(subject, _is_teacher, lambda teacher: _taught(change, teacher))


def _swapped_times(subject: Subject) -> Subject | None:
    def change(net: Network) -> Network:
        return lambda x, t, r, cond: net(x, r, t, cond)

    return _with_parts(subject, _is_teacher, lambda teacher: _taught(change, teacher))


def _leaking(subject: Subject) -> Subject | None:
    """No stop-gradient: teachers and derivatives leak and .detach() does nothing."""

    def leak(part: Any) -> Any:
        return Leaky() if is_derivative(part) else replace(_taught(_same, part), inner=None)

    planted = _with_parts(subject, lambda part: is_derivative(part) or _is_teacher(part), leak)
    return planted and replace(planted, around=_without_detach)


def _wrong_clamp(subject: Subject) -> Subject | None:
    def change(part: Rcgm) -> Rcgm:
        return WrongClamp(order=part.order, delta=part.delta)

    return _with_parts(subject, lambda part: isinstance(part, Rcgm), change)


def _recombined(subject: Subject) -> Subject | None:
    if "restart" not in valid_samplers(subject.make()):
        return None

    def edit(sampler: Any) -> Any:
        if not isinstance(sampler, Restart):
            return sampler
        return Recombined(nfe=sampler.nfe, path=sampler.path)

    return replace(subject, edit_sampler=edit)


RECOMBINED = "r = 0 head recombined without fresh noise"
MUTATIONS = (
    Mutation("tangents (v, 0, 1)", _tangents(lambda a, b, c: (a, c, b))),
    Mutation("tangents (v, 1, 1)", _tangents(lambda a, b, c: (a, b + c, b + c))),
    Mutation("tangents (v, 0, 0)", _tangents(lambda a, b, c: (a, 0 * b, 0 * c))),
    Mutation("tangents (0, 1, 0)", _tangents(lambda a, b, c: (0 * a, b, c))),
    Mutation("derivative with the other sign", _tangents(lambda a, b, c: (a, b, c), -1)),
    Mutation("t - r fed where r is expected", _gap_for_r),
    Mutation("no stop-gradient", _leaking),
    Mutation("lam and gamma swapped in the tangents", _swapped_ends),
    Mutation("teacher at swapped times", _swapped_times),
    Mutation("later steps of a teacher at its first t", _later_at_first),
    Mutation("finite difference with the wrong clamp", _wrong_clamp),
    Mutation(RECOMBINED, _recombined),
)


def _same(net: Network) -> Network:
    return net


def _is_teacher(part: object) -> bool:
    return isinstance(part, Teacher)


def _taught(change: Callable[[Network], Network], teacher: Any) -> Taught:
    return Taught(change, teacher, getattr(teacher, "distils", False), teacher.needs_copy)


def _with_parts(
    subject: Subject, chosen: Callable[[Any], bool], change: Callable[[Any], Any]
) -> Subject | None:
    """The subject with every chosen part changed, by default and where it is made exact.

    None where no part is chosen.
    """
    made = [form.objective(exact=exact) for form, exact in subject.variants()]
    if not any(chosen(part) for objective in made for _, part in parts(objective)):
        return None

    def edit(objective: Any) -> Any:
        changes = {}
        for f in fields(objective):
            value = getattr(objective, f.name)
            if f.init and chosen(value):
                changes[f.name] = change(value)
            elif f.init and is_dataclass(value):
                changes[f.name] = edit(value)
        return replace(objective, **changes)

    return replace(subject, edit=edit)


@contextmanager
def _without_detach() -> Iterator[None]:
    torch.Tensor.detach = lambda self: self  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        del torch.Tensor.detach  # uncovers the method of the base class
