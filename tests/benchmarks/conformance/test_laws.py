"""Methods whose fixed point is that of a law, and outputs beside u and v: right and wrong ones.

The exact map is stationary in the mean over batches, and an error in all calls is pulled back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from backbones.heads import Readouts
from benchmarks.conformance import fixed_point
from benchmarks.conformance.results import run_claim
from benchmarks.conformance.subject import Subject
from registry import heads
from registry.protocols import LossOutput
from zoo.ops import like, mean_flat, normal_like

CLAIMS = {
    "gaussian": fixed_point.at_gaussian,
    "mixture": fixed_point.at_mixture,
    "pulled": fixed_point.pulled_back,
}
SLOW = pytest.mark.slow


def status(make, claim):
    return run_claim(claim, CLAIMS[claim], Subject("mine", make)).status


@dataclass(frozen=True, kw_only=True)
class MomentMatching:
    """IMM: steps from t and from r to s give one law, by a kernel over the pairs of a group.

    The mean over pairs leaves out a row with itself.
    """

    heads: ClassVar = ("u",)
    fixed_point: ClassVar = "distribution"
    couples_rows: ClassVar = True

    size: int = 4  # of a group, which shares its times
    cross: float = 2.0
    sign: int = 1
    with_itself: bool = False

    def loss(self, net, batch, rng):
        x0, x1, n = batch.x0, normal_like(batch.x0, rng), len(batch.x0)
        group = torch.arange(n) // self.size
        t, r, s = torch.rand(3, n, generator=rng).sort(0, descending=True).values[:, group]
        y_t = self.step(net, x0 + like(t, x0) * (x1 - x0), t, s, batch.cond)
        with torch.no_grad():
            y_r = self.step(net, x0 + like(r, x0) * (x1 - x0), r, s, batch.cond)
        pairs = group[:, None] == group
        if not self.with_itself:
            pairs = pairs & ~torch.eye(n, dtype=torch.bool)
        gap = kernel(y_t, y_t) - self.cross * kernel(y_t, y_r)
        per_row = torch.where(pairs, gap, 0).sum(1) / pairs.sum(1).clamp_min(1)
        return LossOutput(per_sample=self.sign * per_row, t=t, r=s)

    def step(self, net, x, t, s, cond):
        return x - like(t - s, x) * net(x, t, s, cond)["u"]


def kernel(a, b):
    square = (a[:, None] - b).square().flatten(2).mean(2)
    return torch.exp(-(square + 1e-8).sqrt())


@dataclass(frozen=True, kw_only=True)
class Drifting:
    """Samples of one step drift towards data and away from each other, until the laws are one."""

    heads: ClassVar = ("u",)
    fixed_point: ClassVar = "distribution"
    couples_rows: ClassVar = True

    repulsion: float = 1.0
    sign: int = 1

    def loss(self, net, batch, rng):
        x1 = normal_like(batch.x0, rng)
        n, one = len(x1), torch.ones(len(x1))
        f = x1 - net(x1, one, 0 * one, batch.cond)["u"]
        made, data = f.detach().flatten(1), batch.x0.flatten(1)
        others = 1e6 * torch.eye(n)  # a pair of a row with itself is left out
        logits = -torch.cat([torch.cdist(made, data) + others, torch.cdist(made, made) + others], 1)
        near = (logits.softmax(1) * logits.softmax(0)).sqrt()
        to_data, to_made = near[:, :n], near[:, n:]
        pull = (to_data * to_made.sum(1, keepdim=True)) @ data
        push = (to_made * to_data.sum(1, keepdim=True)) @ made
        drift = self.sign * (pull - self.repulsion * push)
        target = made + drift / drift.square().mean().sqrt().clamp_min(1e-6)
        return LossOutput(per_sample=mean_flat((f - target.reshape(f.shape)) ** 2))


@pytest.mark.parametrize("make", [MomentMatching, Drifting])
@pytest.mark.parametrize("claim", ["gaussian", pytest.param("mixture", marks=SLOW), "pulled"])
def test_a_method_that_matches_laws_passes(make, claim):
    assert status(make, claim) == "ok"


@pytest.mark.parametrize("make", [MomentMatching, Drifting])
def test_its_sign_decides_whether_the_law_is_pulled_back(make):
    flipped = lambda: make(sign=-1)  # noqa: E731
    result = run_claim("pulled", fixed_point.pulled_back, Subject("mine", flipped))
    assert result.status == "FAIL"
    assert "not pushed back" in result.reason
    assert status(flipped, "gaussian") == "ok"  # it is as stationary


@pytest.mark.parametrize(
    ("make", "claim"),
    [
        (lambda: MomentMatching(cross=1.0), "gaussian"),
        (lambda: MomentMatching(cross=3.0), "gaussian"),
        (lambda: Drifting(repulsion=0.5), "gaussian"),
        pytest.param(lambda: MomentMatching(with_itself=True), "mixture", marks=SLOW),
    ],
)
def test_a_wrong_coefficient_moves_the_exact_map(make, claim):
    result = run_claim(claim, CLAIMS[claim], Subject("mine", make))
    assert result.status == "FAIL"
    assert "leave out the pairs of a row with itself" in result.hint


class TwinHead(Readouts):
    """A second velocity."""

    keys = ("twin",)
    needs_r: ClassVar = False


@pytest.fixture
def twin_head():
    with heads.temporary("twin_of_the_tests", TwinHead):
        yield


@dataclass(frozen=True, kw_only=True)
class Twin:
    """Flow matching of u on data and of a twin on samples, and u learns from their difference.

    TwinFlow without its few-step loss, with which u(x, 1, 0) would be pulled back in any case.
    """

    heads: ClassVar = ("u", "twin")
    trains: ClassVar = ("velocity",)
    exact_outputs: ClassVar = {"twin": "v"}

    sign: int = 1

    def loss(self, net, batch, rng):
        x0, x1 = batch.x0, normal_like(batch.x0, rng)
        start, noise = normal_like(x0, rng), normal_like(x0, rng)
        t, one = torch.rand(len(x0), generator=rng), torch.ones(len(x0))
        u = net(start, one, 0 * one, batch.cond)["u"]
        made = (start - u).detach()
        x, x_made = x0 + like(t, x0) * (x1 - x0), made + like(t, x0) * (noise - made)
        v, twin = net(x, t, t, batch.cond)["u"], net(x_made, t, t, batch.cond)["twin"]
        with torch.no_grad():
            seen = net(x_made, t, t, batch.cond)
        target = u.detach() - self.sign * (seen["twin"] - seen["u"])
        error = (v - (x1 - x0)) ** 2 + (twin - (noise - made)) ** 2 + (u - target) ** 2
        return LossOutput(per_sample=mean_flat(error))


@pytest.mark.usefixtures("twin_head")
@pytest.mark.parametrize("claim", ["gaussian", "pulled"])
def test_an_output_whose_exact_value_is_declared_is_tested_like_v(claim):
    assert status(Twin, claim) == "ok"


@pytest.mark.usefixtures("twin_head")
def test_a_twin_that_follows_the_samples_tells_the_sign():
    """With u off, the twin learns other samples; beside the exact twin nothing moves."""
    result = run_claim("pulled", fixed_point.pulled_back, Subject("m", lambda: Twin(sign=-1)))
    assert result.status == "FAIL"
    assert "an error of 0.1 in 'u' at r < t" in result.reason
    assert status(lambda: Twin(sign=-1), "gaussian") == "ok"


@pytest.mark.usefixtures("twin_head")
def test_a_twin_that_learns_something_else_is_no_fixed_point():
    @dataclass(frozen=True, kw_only=True)
    class Average(Twin):
        exact_outputs: ClassVar = {"twin": "u"}

        def loss(self, net, batch, rng):
            def later(x, t, r, cond):
                return net(x, t, 0 * r, cond)

            return super().loss(later, batch, rng)

    assert status(Average, "gaussian") == "FAIL"


def test_an_output_of_unknown_value_is_not_tested():
    @dataclass(frozen=True, kw_only=True)
    class Silent(Twin):
        exact_outputs: ClassVar = {}

    result = run_claim("gaussian", fixed_point.at_gaussian, Subject("mine", Silent))
    assert result.status == "declared"
    assert "no exact twin is known" in result.reason
