"""Claims about a data set: what its rows are, and that they depend on (step, n, seed) alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.conformance.parts.part import Claims, Part, check_untouched, first_of
from benchmarks.conformance.results import Broken, ClaimResult, compared, declared, held
from registry import datasets
from registry.protocols import (
    Coded,
    Cond,
    Share,
    Shareable,
    check_reference,
    is_picture,
    read_share,
)

Rows = tuple[Tensor, Cond | None]
MOST_NUMBERS = 2**22  # in a batch that is read here
LABELS = 2000
LIMIT = 5.0  # standard errors, over the classes
ALIKE = 0.5  # of a standard deviation: a reference may be a part of its own, but no other data


@dataclass(eq=False)
class DataSet:
    """The data set under test, and the same one made again, since it may take long to make."""

    part: Part
    data: Any

    @cached_property
    def again(self) -> Any:
        return self.part.make()

    def rows(self, n: int) -> int:
        """At most n, and fewer where rows are large."""
        return max(4, min(n, MOST_NUMBERS // max(math.prod(self.data.shape), 1)))


def subject_of(name: str) -> DataSet:
    return DataSet(*first_of(datasets, name))


def describes_itself(subject: DataSet) -> ClaimResult:
    """name, shape, num_classes and size are a text and whole numbers; identity is a stable text."""
    data = subject.data
    for name, right, wanted in (
        ("name", lambda v: isinstance(v, str) and v, "a text"),
        (
            "shape",
            lambda v: isinstance(v, tuple) and v and all(isinstance(k, int) and k > 0 for k in v),
            "a tuple of whole numbers, such as (3, 32, 32)",
        ),
        ("num_classes", _is_count, "a whole number, 0 without labels"),
        ("size", _is_count, "a whole number, 0 for data without end"),
    ):
        if not right(value := getattr(data, name)):
            raise Broken(f"{name} is {value!r}", f"give {wanted}")
    told = data.identity()
    if not (isinstance(told, str) and told.strip()):
        raise Broken(f"identity() is {told!r}", "name the data, their count and a hash of them")
    again = (data.identity(), subject.again.identity())
    if again != (told, told):
        raise Broken(
            f"identity() is {told!r} once and {next(a for a in again if a != told)!r} later",
            "it says which data these are: no time, no address of an object, no draw",
        )
    return held(told)


def batches(subject: DataSet) -> ClaimResult:
    """A batch has n rows of the shape, float32, finite and in range; labels fit num_classes."""
    data, read = subject.data, 0
    for step in (0, 1, 7):
        for n in (1, 3, subject.rows(64)):
            _checked(partial(read_share, data, step, n, 0, Share()))
            read += n
    return held(f"{read} rows of {list(data.shape)}")


def reference(subject: DataSet) -> ClaimResult:
    """The reference has n rows, or all there are; it is the same at every time."""
    data, n = subject.data, subject.rows(256)
    x0, cond = _checked(lambda: check_reference(data, n, 0))
    data.batch(3, 5, 0)
    others = _checked(lambda: check_reference(data, n, 0)), subject.again.reference(n, 0)
    for again in others:
        if not _equal((x0, cond), again):
            raise Broken(
                f"reference({n}, 0) differs from call to call",
                "it depends on n and seed alone: metrics of different steps must be comparable",
            )
    return held(f"{len(x0)} rows")


def determined(subject: DataSet) -> ClaimResult:
    """A batch depends on (step, n, seed) alone; what is done to it afterwards changes no other."""
    data, n = subject.data, subject.rows(16)
    given = data.batch(2, n, 0)
    kept = _copied(given)
    given[0].zero_()
    data.batch(5, n, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        others = {
            "later": data.batch(2, n, 0),
            "on a new data set": subject.again.batch(2, n, 0),
        }
    for when, again in others.items():
        if not _equal(kept, again):
            raise Broken(
                f"batch(2, {n}, 0) is another one {when}",
                "it is a function of (step, n, seed): seed a generator of its own with them, keep "
                "no place in the data, and give copies of what is kept",
            )
    check_untouched("the data set", lambda: data.batch(11, n, 0))
    return held("bit-equal")


def steps_differ(subject: DataSet) -> ClaimResult:
    """Another step and another seed give other rows."""
    data = subject.data
    if data.size == 1:
        return declared("it has one sample")
    n = subject.rows(16)
    found = {
        f"batch({step}, {n}, {seed})": data.batch(step, n, seed)[0]
        for step, seed in ((0, 0), (1, 0), (2, 0), (1000, 0), (0, 1), (1, 1))
    }
    names = list(found)
    for number, name in enumerate(names):
        for other in names[:number]:
            if torch.equal(found[name], found[other]):
                raise Broken(
                    f"{other} and {name} are the same",
                    "each step takes other rows, in an order that the seed decides",
                )
    return held(f"{len(names)} batches")


def like_the_reference(subject: DataSet) -> ClaimResult:
    """Batches and reference are of the same data: means and spreads are alike."""
    data, n = subject.data, subject.rows(1024)
    batch, fixed = data.batch(0, n, 0)[0].double(), data.reference(n, 0)[0].double()
    spread = fixed.std().clamp_min(1e-12) if fixed.numel() > 1 else torch.ones(())
    noise = 6 / min(len(batch), len(fixed)) ** 0.5
    mean = float((batch.mean() - fixed.mean()).abs() / spread)
    ratio = float((batch.std() / spread).log().abs())
    return compared(
        "difference",
        max(mean, ratio),
        ALIKE + noise,
        f"a batch has mean {float(batch.mean()):.3g} and spread {float(batch.std()):.3g}, the "
        f"reference {float(fixed.mean()):.3g} and {float(fixed.std()):.3g}",
        "samples are compared with the reference: it is scaled as batches are",
    )


def sample_labels(subject: DataSet) -> ClaimResult:
    """Labels for samples have the frequencies of the data, and are always the same."""
    data = subject.data
    if not data.num_classes:
        if data.sample_labels(5) is not None:
            raise Broken("sample_labels gives conditions, and num_classes is 0", "give None")
        return declared("no labels")
    n = subject.rows(512)
    seen = [data.batch(step, n, 0)[1]["label"] for step in range(math.ceil(LABELS / n))][:8]
    found = torch.cat(seen)
    given = data.sample_labels(LABELS)["label"]
    if not torch.equal(given, data.sample_labels(LABELS)["label"]):
        raise Broken("two calls of sample_labels differ", "it depends on n alone")
    ours, theirs = (_shares(labels, data.num_classes) for labels in (given, found))
    common = (ours + theirs) / 2
    error = (common * (1 - common) * (1 / len(given) + 1 / len(found))).sqrt() + 1 / len(found)
    z = (ours - theirs).abs() / error
    worst = int(z.argmax())
    return compared(
        "z",
        float(z[worst]),
        LIMIT,
        f"the class {worst} has {float(ours[worst]):.1%} of sample_labels({LABELS}) and "
        f"{float(theirs[worst]):.1%} of the batches",
        "give each class as often as in the data (benchmarks.data.streams.apportion)",
    )


def shares(subject: DataSet) -> ClaimResult:
    """A share of a batch has the rows that these places have in the whole batch."""
    data, n = subject.data, subject.rows(13)
    if not isinstance(subject.data, Shareable):
        return declared("no batch_share")
    whole, cond = data.batch(4, n, 0)
    for share in (Share(0, 1), Share(0, 2), Share(1, 2), Share(2, 3)):
        part, its_cond = data.batch_share(4, n, 0, share)
        if not torch.equal(part, share.rows(whole)[0]):
            raise Broken(
                f"share {share.number} of {share.count} has other rows than the whole batch",
                "draw what is random for the whole batch, and read share.rows(places) of it",
            )
        if not _equal((part, its_cond), (part, cond)):
            raise Broken(
                f"share {share.number} of {share.count} has other conditions than the batch",
                "the conditions are those of all n rows",
            )
    return held("4 shares")


def decodes(subject: DataSet) -> ClaimResult:
    """Codes are decoded to pictures, finite, one for each."""
    data = subject.data
    if not isinstance(subject.data, Coded):
        return declared("no decode")
    with torch.no_grad():
        pixels = data.decode(data.reference(2, 0)[0])
    if not is_picture(pixels.shape[1:]) or len(pixels) != 2 or not pixels.isfinite().all():
        raise Broken(
            f"2 codes are decoded to {list(pixels.shape)}", "give [n c h w] with 1 or 3 channels"
        )
    return held(f"{list(pixels.shape[1:])}")


CLAIMS: Claims = {
    "describes itself": describes_itself,
    "batches": batches,
    "determined by step, n and seed": determined,
    "steps and seeds differ": steps_differ,
    "a fixed reference": reference,
    "reference like the batches": like_the_reference,
    "labels of samples": sample_labels,
    "shares of a batch": shares,
    "codes are decoded": decodes,
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _checked(read: Callable[[], Rows]) -> Rows:
    try:
        return read()
    except ValueError as error:
        first, _, rest = str(error).partition("; ")
        raise Broken(first, rest or "registry/protocols/rows.py says what rows must be") from error


def _copied(rows: Rows) -> Rows:
    x0, cond = rows
    return x0.clone(), cond and {name: value.clone() for name, value in cond.items()}


def _equal(one: Rows, other: Rows) -> bool:
    conds = (one[1] or {}, other[1] or {})
    return torch.equal(one[0], other[0]) and (
        conds[0].keys() == conds[1].keys()
        and all(torch.equal(conds[0][name], conds[1][name]) for name in conds[0])
    )


def _shares(labels: Tensor, num_classes: int) -> Tensor:
    labels = labels[labels >= 0]
    return torch.bincount(labels, minlength=num_classes).double() / max(len(labels), 1)
