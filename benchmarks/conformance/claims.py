"""Claims that every objective must meet, whatever its mathematics: on random networks and data."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.conformance.networks import Tapped
from benchmarks.conformance.results import (
    HEADS,
    Broken,
    Claim,
    Result,
    compared,
    declared,
    held,
    note,
)
from benchmarks.conformance.subject import (
    STEPS,
    Subject,
    gradients,
    is_derivative,
    random_batch,
    replaced,
)
from registry import derivatives
from registry.protocols import NULL_LABEL, Batch, LossOutput, Share, parts

SHAPES = ((2,), (1,), (3, 4), (1, 8, 8))
SHARE = (
    "draw noise, times and labels for the whole batch, then keep the rows of the share: "
    "x0, x1, t = batch.share.rows(batch.x0, x1, t)"
)
LIKE = "multiply [b] with [b *d] by zoo.ops.like(t, x); reduce with zoo.ops.mean_flat"


def evaluate(subject: Subject, batch: Batch, case: str, hint: str, seed: int = 0) -> LossOutput:
    """The loss on a random network; whatever it raises names the case."""
    shape = tuple(batch.x0.shape[1:])
    try:
        return subject.on_toy(shape)(batch, seed)
    except Exception as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        hint = HEADS if isinstance(error, KeyError) else hint
        raise Broken(f"{case}: {type(error).__name__}: {text}", hint) from error


def one_loss_per_row(subject: Subject) -> Result:
    """The others need this one."""
    batch = random_batch()
    contract = "batch.x0 is [b *d] and batch.cond may be None; see registry/protocols.py"
    out = evaluate(subject, batch, "8 rows of shape (2,), without labels", contract)
    if not isinstance(out, LossOutput):
        raise Broken(
            f"loss returns a {type(out).__name__}, not a LossOutput",
            "return LossOutput(per_sample=..., terms={...}) of registry.protocols",
        )
    _check_per_sample(out, batch, "8 rows of shape (2,)")
    if not out.per_sample.requires_grad:
        raise Broken(
            "per_sample has no gradient",
            "detach the target alone; the prediction must come from a call with gradient",
        )
    return held(f"per_sample {list(out.per_sample.shape)}")


def shapes_and_dtypes(subject: Subject) -> Result:
    """Vectors, images and anything between, in single and double precision."""
    cases = 0
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            case = f"{str(dtype).removeprefix('torch.')} data of shape {list(shape)}"
            batch = random_batch(shape, dtype=dtype)
            out = evaluate(subject, batch, case, LIKE)
            _check_per_sample(out, batch, case)
            for name, rows in {**out.terms, **out.diagnostics}.items():
                _check_recorded(name, rows, len(batch), case)
            cases += 1
    return held(f"{cases} cases")


def few_rows(subject: Subject) -> Result:
    """A last batch may have a single row; schedules may be anywhere."""
    cases = 0
    for n in (1, 2, 3, 5):
        for step in STEPS:
            case = f"{n} row{'s' * (n > 1)} at step {step}"
            batch = random_batch(n=n, step=step)
            hint = "a share of n rows may be none, and a spread over one row is nan"
            out = evaluate(subject, batch, case, hint)
            _check_per_sample(out, batch, case)
            if not out.per_sample.isfinite().all():
                raise Broken(f"{case}: per_sample is {out.per_sample.tolist()}", hint)
            cases += 1
    return held(f"{cases} cases")


def labels(subject: Subject) -> Result:
    """Data without labels, with labels, and with every label dropped; labels reach the network."""
    cond = "pass batch.cond (or its dropped-label form) to every call of the network"
    for kind in ("none", "null", "given"):
        out = evaluate(subject, batch := random_batch(n=16, labels=kind), f"labels: {kind}", cond)
        _check_per_sample(out, batch, f"labels: {kind}")
    toy = subject.on_toy()
    toy(batch, net=(net := Tapped(toy.net, 16)))
    seen = [call.labels for call in net.calls if call.with_gradient and call.labels is not None]
    if not any(bool(torch.any(labels != NULL_LABEL)) for labels in seen):
        raise Broken("no label reaches a call that is trained", cond)
    return held("none, dropped, given")


def finite(subject: Subject) -> Result:
    """Also where networks start, at zero outputs, and on constant data: the loss and gradient."""
    largest = 0.0
    for scale, constant in ((0.0, True), (0.0, False), (1.0, True), (1.0, False)):
        for step in STEPS:
            batch = random_batch(n=256, step=step, dtype=torch.float32, labels="given")
            if constant:
                batch = replace(batch, x0=torch.zeros_like(batch.x0))
            toy = subject.on_toy(scale=scale)
            out = toy(batch, seed=step)
            figures = [out.per_sample, *out.terms.values(), *out.diagnostics.values()]
            figures += gradients(out.per_sample, list(toy.net.parameters()))
            if not all(figure.isfinite().all() for figure in figures):
                what = "a network of zeros" if scale == 0 else "a random network"
                raise Broken(
                    f"not finite on {what}, {'constant' if constant else 'normal'} data, "
                    f"step {step}",
                    "look for 0/0 where r = t and for the slope of sqrt or a norm at 0",
                )
            largest = max(largest, float(out.per_sample.detach().abs().max()))
    return held(f"|loss| up to {largest:.3g}")


def calls_within_times(subject: Subject) -> Result:
    """0 <= r <= t <= 1 in every call, and one time for each row."""
    slack, excess = 0.02, 0.0  # a central difference steps a little outside
    for seed, step in enumerate(STEPS):
        batch, toy = random_batch(n=64, step=step, labels="given"), subject.on_toy()
        net = Tapped(toy.net, 64)  # its own teacher, to see those calls too
        subject.loss(subject.objective(teacher=net), net, batch, seed)
        for call in net.calls:
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


def batch_left_alone(subject: Subject) -> Result:
    """The batch belongs to the trainer, which may use it again."""
    batch = random_batch(labels="given")
    assert batch.cond is not None
    before = batch.x0.clone(), batch.cond["label"].clone()
    evaluate(subject, batch, "8 rows", "see above")
    changed = [
        name
        for name, old, new in (
            ("batch.x0", before[0], batch.x0),
            ("batch.cond['label']", before[1], batch.cond["label"]),
        )
        if not torch.equal(old, new)
    ]
    if changed:
        raise Broken(
            f"{' and '.join(changed)} changed in place",
            "write x = x * a instead of x *= a or x.mul_(a), and torch.where for labels",
        )
    return held("x0, labels")


def deterministic(subject: Subject) -> Result:
    """The same rng gives the same loss, on the same instance too; another one another loss."""
    batch, toy = random_batch(n=16), subject.on_toy()

    def loss(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        return toy(batch, seed).per_sample.detach()

    with torch.random.fork_rng(devices=[]):
        first, again, elsewhere, other = loss(0, 0), loss(0, 0), loss(0, 1), loss(1, 0)
    if not torch.equal(first, again):
        raise Broken(
            "two calls with the same rng differ",
            "keep no counter or cache in the objective and draw with generator=rng alone, not by "
            "numpy or random; schedules read batch.step",
        )
    if not torch.equal(first, elsewhere):
        raise Broken(
            "torch.manual_seed changes the loss",
            "draw with generator=rng: zoo.ops.normal_like(x, rng), the time laws",
        )
    if torch.equal(first, other):
        raise Broken("the loss ignores rng", "draw noise and times from the rng that is given")
    _check_noise(subject)
    return held("bit-equal")


def global_generators_untouched(subject: Subject) -> Result:
    """Otherwise runs with different objectives see different data order and noise."""
    batch, toy = random_batch(n=16, labels="given"), subject.on_toy()
    state = random.getstate()
    before = _global_states()
    try:
        toy(batch)
        moved = [
            name for name, old in before.items() if not np.array_equal(old, _global_states()[name])
        ]
    finally:
        random.setstate(state)
    if moved:
        raise Broken(
            f"it draws from the global generator of {', '.join(moved)}",
            "draw with generator=rng: zoo.ops.normal_like(x, rng), the time laws",
        )
    return held("torch, numpy, python")


def rows_are_independent(subject: Subject) -> Result:
    """A row's loss does not change with the data of the other rows."""
    if subject.couples_rows:
        return declared("couples_rows")
    change = 0.0
    for step in STEPS[:2]:
        for kept in (0, 5, 11):
            batch = random_batch(n=12, step=step)
            x0 = random_batch(n=12, seed=1).x0
            x0[kept] = batch.x0[kept]
            one, two = (
                subject.on_toy()(replace(batch, x0=data), seed=3).per_sample[kept].detach()
                for data in (batch.x0, x0)
            )
            change = max(change, float((one - two).abs() / (one.abs() + 1e-3)))
    return compared(
        "change",
        change,
        1e-9,
        "a row's loss depends on the data of other rows",
        "reduce over elements alone (mean_flat); declare couples_rows = True if it is meant",
    )


def share_of_a_batch(subject: Subject) -> Result:
    """A share has the losses that its rows have in the whole batch; it may do without shares."""
    error, wasteful = 0.0, False
    for step in STEPS[:2]:
        batch = random_batch(n=12, step=step, labels="given")
        whole = subject.on_toy()(batch, seed=step).per_sample.detach()
        for share in (Share(0, 2), Share(1, 2), Share(2, 3)):
            part = subject.on_toy()(replace(batch, share=share), seed=step).per_sample.detach()
            wasteful = part.shape == whole.shape
            wanted = whole if wasteful else share.rows(whole)[0]
            if part.shape != wanted.shape:
                raise Broken(f"{len(part)} losses for {len(wanted)} of 12 rows", SHARE)
            error = max(error, float(((part - wanted).abs() / (wanted.abs() + 1e-3)).max()))
    if not error < 1e-4:  # float32 times, in other sums
        raise Broken(f"rows have other losses in a share of the batch, by {error:.2g}", SHARE)
    if wasteful:
        return note("computes the whole batch in every share: right, and slow")
    return held(f"change {error:.2g} < 0.0001", error, 1e-4)


def derivatives_agree(subject: Subject) -> Result:
    """The exact backends to rounding, finite differences to 1e-3, in loss and gradient."""
    chosen = [name for name, part in parts(subject.objective(exact=True)) if is_derivative(part)]
    if not chosen:
        return declared("no derivative part")
    batch, found = random_batch(n=32, labels="given"), {}
    for backend in derivatives.names():
        toy = subject.on_toy(exact=True)
        for name in chosen:
            toy = replace(toy, objective=replaced(toy.objective, name, derivatives.get(backend)()))
        per_sample = toy(batch).per_sample
        gradient = gradients(per_sample, list(toy.net.parameters()))
        found[backend] = torch.cat([per_sample, *(g.flatten() for g in gradient)]).detach()
    size = found["jvp"].norm()
    errors = {name: float((value - found["jvp"]).norm() / size) for name, value in found.items()}
    loose = errors.pop("finite_difference")
    return compared(
        f"finite difference {loose:.1g}; exact",
        max(*errors.values(), loose * 1e-6),
        1e-9,
        f"derivative backends disagree: {errors}, finite_difference {loose:.2g}",
        "the function that is differentiated must be smooth and free of .detach()",
    )


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


def _check_noise(subject: Subject) -> None:
    """On data that are zero, the states of two steps must not lie along the same noise."""
    batch = random_batch(n=16)
    batch, directions = replace(batch, x0=torch.zeros_like(batch.x0)), []
    for seed in (0, 1):
        toy = subject.on_toy()
        net = Tapped(toy.net, 16)
        toy(batch, seed, net=net)
        state = net.calls[0].x.flatten(1)
        directions.append(state / state.norm(dim=1, keepdim=True))
    if len(directions[0]) == len(directions[1]):
        cosine = (directions[0] * directions[1]).sum(1)
        if (cosine > 0.999).all():
            raise Broken("every step has the same noise", "draw x1 = normal_like(batch.x0, rng)")


def _global_states() -> dict[str, np.ndarray]:
    state: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state().numpy(),
        "numpy": np.concatenate([state["state"]["key"], [state["state"]["pos"]]]),
        "python": np.array(random.getstate()[1]),
    }


GENERAL: dict[str, Claim] = {
    "shapes and dtypes": shapes_and_dtypes,
    "few rows": few_rows,
    "labels": labels,
    "finite": finite,
    "calls within 0 <= r <= t <= 1": calls_within_times,
    "batch left alone": batch_left_alone,
    "determined by rng": deterministic,
    "global generators untouched": global_generators_untouched,
    "rows are independent": rows_are_independent,
    "shares of a batch": share_of_a_batch,
    "derivatives agree": derivatives_agree,
}
