"""`check` on weights and couplings: right ones pass, and each claim rejects a wrong one first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from part_cases import by_claim, checked, described, first_failure

from benchmarks.conformance.parts import coupling, weight
from registry import couplings, weights
from zoo.couplings import MinibatchOT
from zoo.weighting import LearnedLogvar, Unweighted


class LogCosh:
    """Right: a bounded slope, and a factor that the error does not change."""

    heads: ClassVar = ()

    def __call__(self, error, out):
        return (1 + error).log()


class Relative:
    """Right: divided by the size of the prediction, an output of the shape of the data."""

    heads: ClassVar = ("u",)

    def __call__(self, error, out):
        return error / (1 + out["u"].detach().flatten(1).square().mean(1))


class OverTheBatch:
    """Right, since it says that rows meet."""

    heads: ClassVar = ()
    couples_rows: ClassVar = True

    def __call__(self, error, out):
        return error / (error.detach().mean() + 1)


class Hidden(LearnedLogvar):
    heads: ClassVar = ()


class Unread(Unweighted):
    heads: ClassVar = ("logvar",)


class Mean(Unweighted):
    def __call__(self, error, out):
        return error.mean()


class Single(Unweighted):
    def __call__(self, error, out):
        return error.float()


class Normalised(Unweighted):
    """Of one row it is 0/0."""

    def __call__(self, error, out):
        return error / (error - error.mean()).detach().abs().mean()


class Silent(OverTheBatch):
    couples_rows: ClassVar = False


class Rise(Unweighted):
    def __call__(self, error, out):
        return 1 / (1 + error)


class Root(Unweighted):
    def __call__(self, error, out):
        return error.sqrt()


class Clipped(Unweighted):
    def __call__(self, error, out):
        return error.clamp_max(5.0)


class Deaf(Unweighted):
    def __call__(self, error, out):
        return error.detach()


class AddsUp(Unweighted):
    def __call__(self, error, out):
        loss = 2 * error
        error += 1
        return loss


@dataclass(frozen=True)
class Warming(Unweighted):
    def __call__(self, error, out):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return error * self.calls


class Noisy(Unweighted):
    def __call__(self, error, out):
        torch.rand(1)
        return error


WRONG = [
    (Hidden, "reads the outputs in heads", "'logvar', and heads is ()", "heads: ClassVar"),
    (Unread, "reads the outputs in heads", "names 'logvar' in heads", "nothing trains"),
    (Mean, "one loss per row", "shape [], not [1]", "a row"),
    (Single, "one loss per row", "torch.float32, not torch.float64", "dtype"),
    (Normalised, "one loss per row", "the loss is [inf]", "one row"),
    (Silent, "rows are independent", "other rows", "couples_rows = True"),
    (Rise, "larger errors cost more", "is -1 where the error is 0", "larger"),
    (Root, "larger errors cost more", "is inf where the error is 0", "offset"),
    (Clipped, "larger errors cost more", "is 0 where the error is 10", "trains nothing"),
    (Deaf, "larger errors cost more", "no gradient", "detach the factor alone"),
    (AddsUp, "draws and changes nothing", "changes the error in place", "x = x * a"),
    (Warming, "draws and changes nothing", "two calls differ", "counter"),
    (Noisy, "draws and changes nothing", "global generator of torch", "rng"),
]  # fmt: skip


@pytest.mark.parametrize("name", weights.names())
def test_registered_weight_passes(name):
    assert not described(by_claim(weights, name))


@pytest.mark.parametrize("cls", [LogCosh, Relative, OverTheBatch])
def test_right_weight_passes(cls):
    assert not described(checked(weights, cls))


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG)
def test_wrong_weight_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(weights, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason
    assert hint in failure.hint


def test_every_claim_rejects_a_wrong_weight_first():
    assert {claim for _, claim, *_ in WRONG} == set(weight.CLAIMS)


class Flipped:
    """Right: another order, which no data decide."""

    def __call__(self, x0, x1):
        return x1.flip(0)


class Sorted:
    """Right, since it says that rows meet: both in the order of their first number."""

    couples_rows: ClassVar = True

    def __call__(self, x0, x1):
        places = x0.flatten(1)[:, 0].argsort().argsort()
        return x1[x1.flatten(1)[:, 0].argsort()][places]


class Nearest:
    """Each row takes the nearest noise, so that some is taken twice."""

    couples_rows: ClassVar = True

    def __call__(self, x0, x1):
        return x1[torch.cdist(x0.flatten(1), x1.flatten(1)).argmin(1)]


class Shrunk:
    def __call__(self, x0, x1):
        return 0.99 * x1


class AtRandom:
    couples_rows: ClassVar = True

    def __call__(self, x0, x1):
        return x1[torch.randperm(len(x1))]


class Kept(Sorted):
    def __call__(self, x0, x1):
        torch.rand(1)
        return super().__call__(x0, x1)


class Moved(Sorted):
    def __call__(self, x0, x1):
        x0 -= x0.mean()
        return super().__call__(x0, x1)


class InSilence(MinibatchOT):
    couples_rows: ClassVar = False


class WithoutNeed(Flipped):
    couples_rows: ClassVar = True


WRONG_COUPLINGS = [
    (Nearest, "a permutation of the noise", "rows are not there", "pairing"),
    (Shrunk, "a permutation of the noise", "is no permutation of x1", "pairing"),
    (AtRandom, "determined by the batch", "two calls differ", "x0 and x1 alone"),
    (Kept, "determined by the batch", "global generator of torch", "rng"),
    (Moved, "determined by the batch", "changes x0 in place", "x = x * a"),
    (InSilence, "couples_rows as declared", "couples_rows is False", "declare"),
    (WithoutNeed, "couples_rows as declared", "in 0 of 12 batches", "declare"),
]  # fmt: skip


@pytest.mark.parametrize("name", couplings.names())
def test_registered_coupling_passes(name):
    assert not described(by_claim(couplings, name))


@pytest.mark.parametrize("cls", [Flipped, Sorted])
def test_right_coupling_passes(cls):
    assert not described(checked(couplings, cls))


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG_COUPLINGS)
def test_wrong_coupling_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(couplings, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason
    assert hint in failure.hint


def test_every_claim_rejects_a_wrong_coupling_first():
    assert {claim for _, claim, *_ in WRONG_COUPLINGS} == set(coupling.CLAIMS)
