"""Time laws: bounds, the quota of rows with r < t, and the stated distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import watch
from scipy import stats

from registry import time_laws
from zoo.objectives.dumo import DuMo
from zoo.objectives.mean_flow import MeanFlow
from zoo.teachers import Online
from zoo.times import (
    BetaPair,
    LogitNormal,
    LogitNormalPair,
    Progressive,
    StepAndEnd,
    Stratified,
    Uniform,
    UniformPair,
    law_at,
    logit_normal_draws,
    quota,
    reaches,
    uniform_draws,
)

N = 20_000
P_VALUE = 1e-4  # the seeds are fixed, so this is no rate of false alarms
fractions = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
counts = st.integers(1, 200)
seeds = st.integers(0, 2**31 - 1)
each = pytest.mark.parametrize("name", time_laws.names())
PAIRS = ("uniform_pair", "logit_normal_pair", "beta_pair")
# Every law, and those with draws of their own besides the default's.
ALL = [time_laws.get(name)() for name in time_laws.names()] + [
    BetaPair(a=2.4, b=0.8),
    BetaPair(r_law="zero"),
    BetaPair(r_law="mix"),
    UniformPair(diagonal="uniform"),
]


def draw(law, n=N, seed=0):
    return law(n, torch.Generator().manual_seed(seed))


def follows(samples, law):
    return stats.kstest(samples.double().numpy(), law.cdf).pvalue > P_VALUE


class LogitLaw:
    """The distribution of sigmoid(mean + std z), or of the larger or smaller of two such draws."""

    def __init__(self, mean, std, of_two=None):
        self.mean, self.std, self.of_two = mean, std, of_two

    def cdf(self, t):
        below = stats.norm.cdf(stats.logistic.ppf(t), self.mean, self.std)
        powers = {None: below, "max": below**2, "min": 1 - (1 - below) ** 2}
        return powers[self.of_two]


@each
@settings(max_examples=25)
@given(n=counts, seed=seeds)
def test_times_are_ordered_and_rows_below_the_diagonal_come_first(name, n, seed):
    law = time_laws.get(name)()
    t, r = draw(law, n, seed)
    assert t.shape == r.shape == (n,)
    assert t.dtype == r.dtype == torch.float32
    assert ((0 <= r) & (r <= t) & (t <= 1)).all()
    k = law.num_off_diagonal(n)
    assert 0 <= k <= n
    assert torch.equal(t[k:], r[k:])
    assert (r[:k] < t[:k]).all()


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25)
@given(n=counts, fraction=fractions)
def test_quota_is_the_fraction_rounded_up(name, n, fraction):
    law = time_laws.get(name)(off_diagonal_fraction=fraction)
    assert law.num_off_diagonal(n) == quota(n, fraction)
    t, r = draw(law, n)
    assert int((r < t).sum()) == quota(n, fraction)


def test_quota_is_exact_in_hundredths():
    """Not one more where a product is rounded up, as 0.07 * 100 = 7.000000000000001."""
    for n in range(1, 201):
        for percent in range(101):
            assert quota(n, percent / 100) == -(-n * percent // 100)


@pytest.mark.parametrize("law", ALL, ids=repr)
def test_law_is_determined_by_its_generator(law):
    before = torch.get_rng_state()
    one, same, other = (draw(law, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("law", ALL, ids=repr)
def test_times_are_drawn_on_the_device_of_the_generator(law):
    with torch.device("meta"):  # what a tensor gets that is told no device
        t, r = draw(law, 8)
    assert t.device.type == r.device.type == "cpu"


@pytest.mark.parametrize("name", ["uniform", "logit_normal", "arctan_normal", "stratified"])
def test_laws_of_t_alone_stay_on_the_diagonal(name):
    law = time_laws.get(name)()
    t, r = draw(law, 100)
    assert torch.equal(t, r)
    assert law.num_off_diagonal(100) == 0


def test_uniform_is_uniform():
    t, _ = draw(Uniform())
    assert follows(t, stats.uniform)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.4, 1.0), (1.2, 0.5)])
def test_logit_normal_has_its_quantiles(mean, std):
    t, _ = draw(LogitNormal(mean=mean, std=std))
    assert follows(t, LogitLaw(mean, std))
    median = float(t.median())  # sigmoid(mean), to 4 standard errors of the logit's median
    assert abs(math.log(median / (1 - median)) - mean) < 4 * std * 1.2533 / N**0.5


@settings(max_examples=20)
@given(n=counts, seed=seeds)
def test_stratified_has_one_draw_in_each_bin(n, seed):
    t, _ = draw(Stratified(), n, seed)
    assert torch.equal((t.double() * n).floor().sort().values, torch.arange(n).double())


def test_stratified_is_uniform_within_its_bins_and_in_no_order():
    t, _ = draw(Stratified(), 4000)
    assert follows((t.double() * 4000) % 1, stats.uniform)
    assert abs(stats.spearmanr(t, torch.arange(4000)).statistic) < 4 / 4000**0.5


def test_uniform_pair_is_the_larger_and_smaller_of_two():
    t, r = draw(UniformPair(off_diagonal_fraction=0.5))
    k = N // 2
    assert follows(t, stats.beta(2, 1))
    assert follows(r[:k], stats.beta(1, 2))
    # Given t the smaller is uniform below it.
    assert follows(r[:k] / t[:k], stats.uniform)
    assert abs(stats.spearmanr(r[:k] / t[:k], t[:k]).statistic) < 4 / k**0.5


def test_uniform_pair_may_be_uniform_on_the_diagonal():
    t, r = draw(UniformPair(off_diagonal_fraction=0.5, diagonal="uniform"))
    k = N // 2
    assert follows(t[k:], stats.uniform)
    before = draw(UniformPair(off_diagonal_fraction=0.5))
    assert torch.equal(t[:k], before[0][:k])
    assert torch.equal(r[:k], before[1][:k])
    with pytest.raises(ValueError, match=r"uniform_pair.diagonal = 'lower'; allowed: larger, unif"):
        UniformPair(diagonal="lower")


def test_step_and_end_leaves_room_for_its_step():
    """The length is logit-normal, and so is the end among the times that the length leaves."""
    t, r = (times.double() for times in draw(StepAndEnd()))
    length = t - r
    assert follows(length, LogitLaw(-0.8, 1.0))
    assert t.max() <= 1
    law = LogitLaw(-0.4, 1.0)
    shares = law.cdf(r) / law.cdf(1 - length)  # uniform, whatever the length is
    assert stats.kstest(shares, stats.uniform.cdf).pvalue > P_VALUE
    assert abs(stats.spearmanr(shares, length).statistic) < 4 / N**0.5
    for name in ("length_std", "r_std"):
        with pytest.raises(ValueError, match=f"step_and_end.{name} = 0.0 must be positive"):
            StepAndEnd(**{name: 0.0})


def test_logit_normal_pair_is_the_larger_and_smaller_of_two():
    """On the diagonal too: t is the larger draw there, as in the released code."""
    t, r = draw(LogitNormalPair(mean=-0.4, std=1.0, off_diagonal_fraction=0.25))
    k = N // 4
    assert follows(t[:k], LogitLaw(-0.4, 1.0, "max"))
    assert follows(t[k:], LogitLaw(-0.4, 1.0, "max"))
    assert follows(r[:k], LogitLaw(-0.4, 1.0, "min"))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (2.4, 2.4), (0.8, 1.0)])
def test_beta_pair_has_a_beta_and_a_uniform_below_it(a, b):
    t, r = draw(BetaPair(a=a, b=b, off_diagonal_fraction=0.9))
    k = quota(N, 0.9)
    assert follows(t, stats.beta(a, b))
    assert abs(float(t.mean()) - a / (a + b)) < 4 * stats.beta(a, b).std() / N**0.5
    assert follows(r[:k] / t[:k], stats.uniform)
    assert abs(stats.spearmanr(r[:k] / t[:k], t[:k]).statistic) < 4 / k**0.5


def test_beta_pair_may_end_at_zero():
    k = quota(N, 0.5)
    _, r = draw(BetaPair(r_law="zero", off_diagonal_fraction=0.5))
    assert (r[:k] == 0).all()
    t, r = draw(BetaPair(r_law="mix", off_diagonal_fraction=0.5))
    assert int((r[:k] == 0).sum()) == k - k // 2
    assert (r[: k // 2] > 0).all()
    assert follows(r[: k // 2] / t[: k // 2], stats.uniform)


def test_laws_of_r_share_their_times():
    """One seed gives one t, whatever is done with r: arms of an ablation see the same states."""
    times = [draw(BetaPair(r_law=law))[0] for law in ("uniform", "zero", "mix")]
    assert torch.equal(times[0], times[1])
    assert torch.equal(times[0], times[2])


def test_draws_are_independent_of_each_other():
    rng = torch.Generator().manual_seed(0)
    for one in (uniform_draws(N, rng), logit_normal_draws(N, 0.3, 2.0, rng)):
        assert abs(stats.spearmanr(one[1:], one[:-1]).statistic) < 4 / N**0.5


@pytest.mark.parametrize(
    ("law", "field", "value"),
    [
        (LogitNormal, "std", 0.0),
        (LogitNormalPair, "std", -1.0),
        (LogitNormalPair, "off_diagonal_fraction", 1.1),
        (UniformPair, "off_diagonal_fraction", -0.1),
        (BetaPair, "a", 0.0),
        (BetaPair, "b", -2.0),
        (BetaPair, "r_law", "one"),
        (BetaPair, "off_diagonal_fraction", 2.0),
    ],
)
def test_impossible_settings_are_refused(law, field, value):
    name = time_laws.name_of(law)
    with pytest.raises(ValueError, match=rf"^{name}\.{field} = "):
        law(**{field: value})


# A law that changes over the run


def test_progressive_sends_a_falling_share_of_the_rows_to_the_data():
    """All of those with r < t at first, half at steps cos(pi / 4), none from `steps` on."""
    law = Progressive(times=UniformPair(off_diagonal_fraction=0.5), steps=1000)
    inner = draw(law.times)
    shares = []
    for step in (0, 1, 707, 999, 1000, 10**6):
        t, r = draw(law_at(law, step))
        k = law.num_off_diagonal(N)
        to_data = int((r[:k] == 0).sum())
        assert (r[:to_data] == 0).all()
        assert torch.equal(t, inner[0])
        assert torch.equal(r[to_data:], inner[1][to_data:])
        assert int((r < t).sum()) == k == N // 2
        shares.append(to_data / k)
    assert shares == pytest.approx([1, 0.9994, 0.5, 0.0285, 0, 0], abs=2e-4)
    assert [law.share(step) for step in (0, 1000, 2000)] == [1, 0, 0]


def test_progressive_reaches_what_its_law_reaches():
    law = Progressive()
    assert reaches(law, 0.8, 0.3)
    assert reaches(law, 0.8, 0.0)
    assert reaches(law, 0.8, 0.8)


def test_laws_without_steps_are_constant():
    law = LogitNormalPair()
    assert law_at(law, 0) is law_at(law, 10**5) is law


def test_objectives_draw_by_the_law_of_their_step():
    law = Progressive(times=UniformPair(off_diagonal_fraction=1.0), steps=10)
    for objective in (MeanFlow(times=law), DuMo(times=law, teacher=Online())):
        seen = {step: watch(objective, n=16, step=step).out.r for step in (0, 5, 10)}
        assert (seen[0] == 0).all()
        assert 0 < int((seen[5] == 0).sum()) < 16
        assert (seen[10] > 0).all()


@pytest.mark.parametrize(
    ("law", "says"),
    [
        (Uniform(), r"progressive.times = @uniform\(\) has no row with r < t"),
        (BetaPair(r_law="zero"), r"progressive.times = @beta_pair\(\) has r = 0 in every row"),
        (UniformPair(off_diagonal_fraction=0.0), "has no row with r < t"),
    ],
)
def test_progressive_refuses_laws_that_it_cannot_change(law, says):
    with pytest.raises(ValueError, match=says):
        Progressive(times=law)
