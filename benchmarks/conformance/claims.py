"""Claims that every objective must meet, whatever its mathematics: on random networks and data."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.networks import Evaluation, Tapped
from benchmarks.conformance.results import (
    HEADS,
    Broken,
    ClaimResult,
    compared,
    declared,
    held,
)
from benchmarks.conformance.subject import (
    STEPS,
    Subject,
    gradients,
    is_derivative,
    replaced,
)
from registry import derivatives
from registry.protocols import NULL_LABEL, Batch, LossOutput, parts, trains_derivative

SHAPES = ((2,), (1,), (3, 4), (1, 8, 8))
LIKE = "multiply [b] with [b *d] by zoo.ops.like(t, x); reduce with zoo.ops.mean_flat"


def evaluate(subject: Subject, batch: Batch, case: str, hint: str, seed: int = 0) -> LossOutput:
    """The loss on a random network; an error in it is reported with the case."""
    shape = tuple(batch.x0.shape[1:])
    try:
        return subject.on_toy(shape)(batch, seed)
    except Exception as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        hint = HEADS if isinstance(error, KeyError) else hint
        raise Broken(f"{case}: {type(error).__name__}: {text}", hint) from error


def one_loss_per_row(subject: Subject) -> ClaimResult:
    """The loss is one number for each row; all other claims need this one."""
    batch = subject.batch()
    contract = "batch.x0 is [b *d] and batch.cond may be None; see registry/protocols"
    case = f"{len(batch)} rows of shape (2,)"
    out = evaluate(subject, batch, f"{case}, without labels", contract)
    if not isinstance(out, LossOutput):
        raise Broken(
            f"loss returns a {type(out).__name__}, not a LossOutput",
            "return LossOutput(per_sample=..., terms={...}) of registry.protocols",
        )
    _check_per_sample(out, batch, case)
    if not out.per_sample.requires_grad:
        raise Broken(
            "per_sample has no gradient",
            "detach the target alone; the prediction must come from a call with gradient",
        )
    return held(f"per_sample {list(out.per_sample.shape)}")


def shapes_and_dtypes(subject: Subject) -> ClaimResult:
    """The loss takes vectors, images and other shapes, in single and double precision."""
    cases = 0
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            case = f"{str(dtype).removeprefix('torch.')} data of shape {list(shape)}"
            batch = subject.batch(shape, dtype=dtype)
            out = evaluate(subject, batch, case, LIKE)
            _check_per_sample(out, batch, case)
            for name, rows in {**out.terms, **out.diagnostics}.items():
                _check_recorded(name, rows, len(batch), case)
            cases += 1
    return held(f"{cases} cases")


def few_rows(subject: Subject) -> ClaimResult:
    """The loss of very few rows, or groups, is finite, at every step of a schedule."""
    cases = 0
    for n in (subject.group * k for k in (1, 2, 3, 5)):
        for step in STEPS:
            case = f"{n} row{'s' * (n > 1)} at step {step}"
            batch = subject.batch(n=n, step=step)
            hint = "a share of n rows may have no row, and the spread over one row is nan"
            out = evaluate(subject, batch, case, hint)
            _check_per_sample(out, batch, case)
            if not out.per_sample.isfinite().all():
                raise Broken(f"{case}: per_sample is {out.per_sample.tolist()}", hint)
            cases += 1
    return held(f"{cases} cases")


def labels(subject: Subject) -> ClaimResult:
    """The loss takes data with labels, without, and with all dropped; labels reach every call.

    A call may have all of its labels dropped, as guidance needs, but no call is without any.
    """
    cond = "pass batch.cond (or its dropped-label form) to every call of the network"
    kinds = ("null", "given") if subject.needs_labels else ("none", "null", "given")
    for kind in kinds:
        out = evaluate(subject, batch := subject.batch(n=16, labels=kind), f"labels: {kind}", cond)
        _check_per_sample(out, batch, f"labels: {kind}")
    toy = subject.on_toy()
    toy(batch, net=(net := Tapped(toy.net, len(batch))))
    seen = [call.labels for call in net.calls if call.with_gradient and call.labels is not None]
    if not any(bool(torch.any(labels != NULL_LABEL)) for labels in seen):
        raise Broken("no label reaches a call that is trained", cond)
    for (form, exact), step in itertools.product(subject.variants(), STEPS):
        calls = _calls(form, subject.batch(n=16, step=step, labels="given"), step, exact=exact)
        for number, call in enumerate(calls):
            if call.labels is None:
                raise Broken(
                    f"a call of the network has no condition: call {number + 1} of {len(calls)}"
                    f"{form.with_changes() * exact}",
                    f"{cond}; a target and a teacher are asked with it too",
                )
    return held(", ".join(kinds).replace("null", "dropped"))


def finite(subject: Subject) -> ClaimResult:
    """Loss and gradient are finite, also on constant data and where networks start, at zero."""
    largest = 0.0
    cases = itertools.product(((0.0, True), (0.0, False), (1.0, True), (1.0, False)), STEPS)
    for ((scale, constant), step), (form, exact) in itertools.product(cases, subject.variants()):
        batch = subject.batch(n=256, step=step, dtype=torch.float32, labels="given")
        if constant:
            batch = replace(batch, x0=torch.zeros_like(batch.x0))
        toy = form.on_toy(exact=exact, scale=scale)
        out = toy(batch, seed=step)
        figures = [out.per_sample, *out.terms.values(), *out.diagnostics.values()]
        figures += gradients(out.per_sample, list(toy.net.parameters()))
        if not all(figure.isfinite().all() for figure in figures):
            what = "a network of zeros" if scale == 0 else "a random network"
            raise Broken(
                f"not finite on {what}, {'constant' if constant else 'normal'} data, step {step}"
                f"{form.with_changes() * exact}",
                "look for 0/0 where r = t and for the slope of sqrt or a norm at 0",
            )
        largest = max(largest, float(out.per_sample.detach().abs().max()))
    return held(f"|loss| up to {largest:.3g}")


def calls_within_times(subject: Subject) -> ClaimResult:
    """Every call has one t and one r for each row, and 0 <= r <= t <= 1."""
    slack, excess = 0.02, 0.0  # a central difference steps a little outside
    for (form, exact), (seed, step) in itertools.product(subject.variants(), enumerate(STEPS)):
        batch = subject.batch(n=64, step=step, labels="given")
        for call in _calls(form, batch, seed, exact=exact):
            n = len(call.x)
            if call.t.shape != (n,) or call.r.shape != (n,):
                raise Broken(
                    f"the network is called with x {list(call.x.shape)}, t {list(call.t.shape)}, "
                    f"r {list(call.r.shape)}",
                    "t and r have the shape [b], as the time law gives them",
                )
            if n:
                bounds = (-call.r).max(), (call.r - call.t).max(), (call.t - 1).max()
                excess = max(excess, *(float(bound) for bound in bounds))
    return compared(
        "outside by",
        max(excess, 0.0),
        slack,
        "the network is called outside 0 <= r <= t <= 1",
        "t is the noisier time: net(x_t, t, r, cond), r being the end of the step",
    )


def _calls(form: Subject, batch: Batch, seed: int, *, exact: bool) -> list[Evaluation]:
    """The calls of the network in training and of every teacher."""
    net = Tapped(form.on_toy(exact=exact).net, len(batch))
    form.loss(form.objective(exact=exact, teacher=net), net, batch, seed)
    return net.calls


def derivatives_agree(subject: Subject) -> ClaimResult:
    """Every backend gives the same loss and gradient: to rounding, differences to 1e-3.

    One that needs no forward-mode rule is by differences. A loss may ask for trained ones alone.
    """
    forms = {form: _derivatives_of(form.objective(exact=True)) for form in subject.forms()}
    found = [
        _disagreement(form, chosen, step)
        for form, chosen in forms.items()
        if chosen
        for step in form.stages(exact=True)
    ]
    if not found:
        return declared("no derivative part")
    exact, loose = (max(errors) for errors in zip(*found, strict=True))
    return compared(
        f"differences {loose:.1g}; exact",
        max(exact, loose * 1e-6),
        1e-9,
        f"derivative backends disagree by {exact:.2g}, those by differences by {loose:.2g}",
        "the function that is differentiated must be smooth and free of .detach()",
    )


def _derivatives_of(objective: Any) -> list[str]:
    return [name for name, part in parts(objective) if is_derivative(part)]


def _disagreement(subject: Subject, chosen: list[str], step: int) -> tuple[float, float]:
    """How far the exact backends, and those by differences, are from `jvp`."""
    batch, found = subject.batch(n=32, labels="given", step=step), {}
    known = {name: derivatives.get(name) for name in derivatives.names()}
    if trains_derivative(subject.make()):
        known = {name: cls for name, cls in known.items() if getattr(cls, "differentiable", False)}
    for backend, cls in known.items():
        toy = subject.on_toy(exact=True)
        for name in chosen:
            toy = replace(toy, objective=replaced(toy.objective, name, cls()))
        per_sample = toy(batch).per_sample
        gradient = gradients(per_sample, list(toy.net.parameters()))
        found[backend] = torch.cat([per_sample, *(g.flatten() for g in gradient)]).detach()
    size = found["jvp"].norm()
    errors = {name: float((value - found["jvp"]).norm() / size) for name, value in found.items()}
    by_differences = [errors.pop(name) for name, cls in known.items() if not cls.needs_forward_ad]
    return max(errors.values()), max(by_differences)


def _check_per_sample(out: LossOutput, batch: Batch, case: str) -> None:
    loss, wanted = out.per_sample, (len(batch),)
    if tuple(loss.shape) != wanted:
        raise Broken(
            f"{case}: per_sample has the shape {list(loss.shape)}, not {list(wanted)}",
            "one loss for each row: mean over elements (mean_flat), not over the batch",
        )
    if loss.dtype != batch.x0.dtype:
        raise Broken(
            f"{case}: per_sample is {loss.dtype}",
            "keep the data's dtype: noise by normal_like(x0, rng), no .float() or .double()",
        )


def _check_recorded(name: str, rows: Tensor, n: int, case: str) -> None:
    if rows.requires_grad:
        raise Broken(f"{case}: {name!r} is recorded with its gradient", "detach what is recorded")
    if rows.ndim != 1 or len(rows) > n:
        raise Broken(
            f"{case}: {name!r} is recorded with the shape {list(rows.shape)}",
            f"record one number for each row that it concerns: [at most {n}]",
        )
