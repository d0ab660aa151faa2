"""`check` on data sets: right ones pass, and each claim rejects a wrong one first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from part_cases import by_claim, checked, described, first_failure

from benchmarks.conformance.parts.data_set import CLAIMS
from benchmarks.data.digits import Digits
from benchmarks.data.mixtures import Gaussian
from registry import datasets
from registry.protocols import Share

NO_FILES = ("digits", "gaussian", "mixture")


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Right: points on a circle in three classes, drawn without end, by nothing of the zoo."""

    name: ClassVar = "ring"
    shape: ClassVar = (2,)
    num_classes: ClassVar = 3
    size: ClassVar = 0
    shares: ClassVar = (0.5, 0.3, 0.2)

    def identity(self):
        return "ring: endless x (2,), radius 1"

    def rows(self, n, seed):
        rng = torch.Generator().manual_seed(seed)
        label = torch.multinomial(torch.tensor(self.shares), n, True, generator=rng)
        angle = 2 * torch.pi * (torch.rand(n, generator=rng) + label) / 3
        return torch.stack([angle.cos(), angle.sin()], 1), {"label": label}

    def batch(self, step, n, seed):
        return self.rows(n, 1_000_003 * (seed + 1) + step)

    def reference(self, n, seed):
        return self.rows(n, 7_000_003 + seed)

    def sample_labels(self, n):
        counts = [round(share * n) for share in self.shares[1:]]
        label = torch.tensor([1] * counts[0] + [2] * counts[1])
        return {"label": torch.cat([label, torch.zeros(n - len(label), dtype=torch.int64)])}


class Nameless(Ring):
    def identity(self):
        return ""


class Timed(Ring):
    def identity(self):
        return f"ring, read at {time.perf_counter_ns()}"


class Listed(Ring):
    shape: ClassVar = [2]


class Double(Ring):
    def rows(self, n, seed):
        x0, cond = super().rows(n, seed)
        return x0.double(), cond


class FromOne(Ring):
    """Labels from 1 to 3."""

    def batch(self, step, n, seed):
        x0, cond = super().batch(step, n, seed)
        return x0, {"label": cond["label"] + 1}


class Bright(Digits):
    """Pictures in [0, 1]."""

    def rows(self, rows):
        return (super().rows(rows) + 1) / 2


class Full(Ring):
    """A batch of at most 32 rows."""

    def batch(self, step, n, seed):
        return super().batch(step, min(n, 32), seed)


class Counting(Ring):
    """The step is counted by the data set, not read."""

    def batch(self, step, n, seed):
        object.__setattr__(self, "read", getattr(self, "read", 0) + 1)
        return super().batch(self.read, n, seed)


class Shared(Ring):
    """What it keeps is what it gives."""

    kept: ClassVar[dict] = {}

    def batch(self, step, n, seed):
        key = type(self), step, n, seed
        if key not in self.kept:
            self.kept[key] = super().batch(step, n, seed)
        return self.kept[key]


class Drawing(Ring):
    def batch(self, step, n, seed):
        torch.rand(1)
        return super().batch(step, n, seed)


class OneStep(Ring):
    def batch(self, step, n, seed):
        return super().batch(0, n, seed)


class OneSeed(Ring):
    def batch(self, step, n, seed):
        return super().batch(step, n, 0)


class Moving(Ring):
    """Another reference at each call."""

    def reference(self, n, seed):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return super().reference(n, seed + self.calls)


class Rescaled(Ring):
    """The reference has three times the spread of the batches."""

    def reference(self, n, seed):
        x0, cond = super().reference(n, seed)
        return 3 * x0, cond


class Uniform(Ring):
    """As many samples of each label, which the data have not."""

    def sample_labels(self, n):
        return {"label": torch.arange(n) % 3}


class Shuffled(Ring):
    def sample_labels(self, n):
        return {"label": super().sample_labels(n)["label"][torch.randperm(n)]}


class Apart(Ring):
    """Each share draws its own rows."""

    def batch_share(self, step, n, seed, share: Share):
        x0, _ = super().batch(step + share.number, share.size(n), seed)
        return x0, super().batch(step, n, seed)[1]


class OwnLabels(Ring):
    """A share has the labels of its rows alone."""

    def batch_share(self, step, n, seed, share: Share):
        return share.rows(*super().batch(step, n, seed))


class Flat(Gaussian):
    """Codes that are decoded to vectors."""

    def decode(self, codes):
        return codes


WRONG = [
    (Nameless, "describes itself", "identity() is ''", "count"),
    (Timed, "describes itself", "once and 'ring, read at", "no time"),
    (Listed, "describes itself", "shape is [2]", "tuple"),
    (Double, "batches", "x0 is of torch.float64", "float32"),
    (FromOne, "batches", "the labels are from ", "num_classes"),
    (Bright, "batches", "x0 has values from 0 to 1", "[-1, 1]"),
    (Full, "batches", "the shape (32, 2)", "64 rows"),
    (Counting, "determined by step, n and seed", "is another one later", "no place in the data"),
    (Shared, "determined by step, n and seed", "is another one later", "copies"),
    (Drawing, "determined by step, n and seed", "global generator of torch", "rng"),
    (OneStep, "steps and seeds differ", "batch(0, 16, 0) and batch(1, 16, 0)", "other rows"),
    (OneSeed, "steps and seeds differ", "batch(0, 16, 0) and batch(0, 16, 1)", "the seed"),
    (Moving, "a fixed reference", "differs from call to call", "n and seed alone"),
    (Rescaled, "reference like the batches", "the reference", "scaled"),
    (Uniform, "labels of samples", "the class 0 has 33.4%", "as often as in the data"),
    (Shuffled, "labels of samples", "two calls of sample_labels differ", "n alone"),
    (Apart, "shares of a batch", "share 0 of 2 has other rows", "whole batch"),
    (OwnLabels, "shares of a batch", "other conditions", "all n rows"),
    (Flat, "codes are decoded", "decoded to [2, 2]", "channels"),
]  # fmt: skip


@pytest.mark.parametrize("name", NO_FILES)
def test_registered_data_set_passes(name):
    assert not described(by_claim(datasets, name))


@pytest.mark.parametrize("cls", [Ring, type("Small", (Digits,), {"load": lambda self: few(6)})])
def test_right_data_set_passes(cls):
    assert not described(checked(datasets, cls))


def few(n):
    """The first pictures alone, fewer than a batch has rows."""
    stored = Digits().stored
    return type(stored)(stored.pixels[:n], stored.labels[:n], stored.classes)


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG)
def test_wrong_data_set_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(datasets, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason + failure.hint
    assert hint in failure.reason + failure.hint


def test_every_claim_rejects_a_wrong_data_set_first():
    assert {claim for _, claim, *_ in WRONG} == set(CLAIMS)
