"""`check` on laws of times and of guidance: right ones pass, and each claim rejects a wrong one."""

from __future__ import annotations

import pytest
import torch
from part_cases import by_claim, checked, described, first_failure

from benchmarks.conformance.parts import guidance_law, time_law
from registry import guidance_laws, time_laws
from zoo.guidance import LogUniformGuidance
from zoo.times import BetaPair, Uniform, UniformPair, quota, uniform_draws


class FromNoise:
    """One step of the whole way in every row: t = 1, r = 0."""

    only_to_data = True

    def __call__(self, n, rng):
        return torch.ones(n, device=rng.device), torch.zeros(n, device=rng.device)

    def num_off_diagonal(self, n):
        return n


class Grid:
    """Steps of a power of two on a grid, as Shortcut has them; a quarter of rows is diagonal."""

    def __call__(self, n, rng):
        k = self.num_off_diagonal(n)
        level = torch.randint(0, 6, (n,), generator=rng, device=rng.device)
        gap = 2.0**-level
        place = torch.rand(n, generator=rng, device=rng.device) * 2.0**level
        t = (place.floor() + 1) * gap
        return t, torch.cat([(t - gap)[:k], t[k:]])

    def num_off_diagonal(self, n):
        return quota(n, 0.75)


class Largest:
    """The largest of three, and it says so."""

    def __call__(self, n, rng):
        t = torch.rand(3, n, generator=rng, device=rng.device).max(0).values
        return t, t

    def num_off_diagonal(self, n):
        return 0

    def cdf(self, t):
        return t**3


class Columns(Uniform):
    def __call__(self, n, rng):
        t, r = super().__call__(n, rng)
        return t[:, None], r[:, None]


class Double(Uniform):
    def __call__(self, n, rng):
        t = torch.rand(n, generator=rng, device=rng.device, dtype=torch.float64)
        return t, t


class PastTheNoise(UniformPair):
    def __call__(self, n, rng):
        t, r = super().__call__(n, rng)
        return t * 1.001, r


class Unordered(UniformPair):
    def __call__(self, n, rng):
        t, r = super().__call__(n, rng)
        return r, t


class Counting(UniformPair):
    """The number of rows goes up with every call."""

    def num_off_diagonal(self, n):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return min(n, self.calls % 3)


class Fraction(UniformPair):
    def num_off_diagonal(self, n):
        return n * self.off_diagonal_fraction


class Mixed(UniformPair):
    """The rows with r < t come last."""

    def __call__(self, n, rng):
        t, r = super().__call__(n, rng)
        return t.flip(0), r.flip(0)


class ByChance(UniformPair):
    """Each row is below the diagonal with a probability, and these rows come first."""

    def __call__(self, n, rng):
        t, r = super().__call__(n, rng)
        r = r * uniform_draws(n, rng)
        chosen = int((uniform_draws(n, rng) < 0.25).sum())
        return t, torch.cat([r[:chosen], t[chosen:]])


class OwnSeed(Uniform):
    def __call__(self, n, rng):
        return super().__call__(n, torch.Generator().manual_seed(0))


class ByNumpy(Uniform):
    def __call__(self, n, rng):
        t = torch.rand(n)
        return t, t


class Wasteful(Uniform):
    def __call__(self, n, rng):
        torch.rand(n)
        return super().__call__(n, rng)


class DefaultDevice(Uniform):
    def __call__(self, n, rng):
        t = (torch.arange(n) + uniform_draws(n, rng)) / n
        return t, t


class SaysToData(UniformPair):
    only_to_data = True


class ToDataInSilence(BetaPair):
    """r is 0 in every row with r < t, and the law does not say so."""

    only_to_data = False

    def __call__(self, n, rng):
        t, r = super().__call__(n, rng)
        return t, torch.where(r < t, 0.0, r)


class SquareRoots(Uniform):
    """sqrt(U) under the law of U."""

    def __call__(self, n, rng):
        t, r = super().__call__(n, rng)
        return t.sqrt(), r.sqrt()


class Narrow(Uniform):
    """One time in fifty is drawn near the middle."""

    def __call__(self, n, rng):
        t = uniform_draws(n, rng)
        t = torch.where(uniform_draws(n, rng) < 0.04, 0.5 + 0.1 * (t - 0.5), t)
        return t, t


class AtStep(UniformPair):
    """What it settles to is right; `late` is its law from step 9,000 on."""

    def at_step(self, step):
        return self.late if step >= 9000 else UniformPair()


class LatePastTheNoise(AtStep):
    late = PastTheNoise()


class LateMixed(AtStep):
    late = Mixed()


class LateByChance(AtStep):
    """The number of rows depends on the draw."""

    late = ByChance()


class LateSquareRoots(AtStep):
    """A step states another distribution than it has."""

    late = type("Roots", (UniformPair,), {"cdf": lambda self, t: t})()


class MoreLater(AtStep):
    late = UniformPair(off_diagonal_fraction=0.5)


WRONG = [
    (LatePastTheNoise, "0 <= r <= t <= 1", "at step 9000: t = 1.00", "noisier"),
    (LateMixed, "rows with r < t come first", "at step 9000: of 2 rows", "come first"),
    (LateByChance, "rows with r < t come first", "at step 9000: of ", "num_off_diagonal(n)"),
    (LateSquareRoots, "follows its stated distribution", "at step 9000: the times", "all rows"),
    (MoreLater, "the same number at every step", "at step 9000 and", "ask the law itself"),
    (Columns, "shapes and dtypes", "shape [1, 1], not [1]", "[b]"),
    (Double, "shapes and dtypes", "torch.float64, not torch.float32", "dtype"),
    (PastTheNoise, "0 <= r <= t <= 1", "t = 1.00", "noisier"),
    (Unordered, "0 <= r <= t <= 1", "and r = ", "noisier"),
    (Counting, "a number that depends on n alone", "another time", "n alone"),
    (Fraction, "a number that depends on n alone", "num_off_diagonal(1) is 0.25", "quota"),
    (Mixed, "rows with r < t come first", "num_off_diagonal(2) is 1", "come first"),
    (ByChance, "rows with r < t come first", "rows 0 have r < t", "num_off_diagonal(n)"),
    (OwnSeed, "determined by rng", "every rng gives the same rows", "from the rng"),
    (ByNumpy, "determined by rng", "same rng differ", "generator=rng"),
    (Wasteful, "global generators untouched", "global generator of torch", "generator=rng"),
    (DefaultDevice, "on the device of rng", "mixes devices", "device=rng.device"),
    (SaysToData, "reaches what it declares", "only_to_data is True", "r is 0 in every row"),
    (ToDataInSilence, "reaches what it declares", "0.0% of the rows", "only_to_data = True"),
    (SquareRoots, "follows its stated distribution", "most at t = 0.49", "cdf(t) is the share"),
    (Narrow, "follows its stated distribution", "do not follow cdf(t)", "cdf(t) is the share"),
]  # fmt: skip


STATED = (
    "uniform",
    "logit_normal",
    "arctan_normal",
    "stratified",
    "uniform_pair",
    "logit_normal_pair",
    "beta_pair",
)


@pytest.mark.parametrize("name", time_laws.names())
def test_registered_law_passes(name):
    results = by_claim(time_laws, name)
    assert not described(results)
    assert name not in STATED or results["follows its stated distribution"].status == "ok"


@pytest.mark.parametrize(
    "cls",
    [
        *(FromNoise, Grid, Largest),
        lambda: BetaPair(a=2.4, b=0.8),
        lambda: BetaPair(r_law="zero"),
        lambda: BetaPair(r_law="mix", off_diagonal_fraction=0.5),
        lambda: UniformPair(off_diagonal_fraction=0.0),
        lambda: UniformPair(off_diagonal_fraction=1.0),
    ],
)
def test_right_law_passes(cls):
    made = cls if isinstance(cls, type) else type("Made", (), {"__new__": lambda _: cls()})
    assert not described(checked(time_laws, made))


@pytest.mark.parametrize(("cls", "claim", "reason", "hint"), WRONG)
def test_wrong_law_is_told_why_and_what_to_do(cls, claim, reason, hint):
    failure = first_failure(time_laws, cls)
    assert failure.claim == claim, failure
    assert reason in failure.reason
    assert hint in failure.hint


def test_every_claim_rejects_a_wrong_law_first():
    assert {claim for _, claim, *_ in WRONG} == set(time_law.CLAIMS)


class ThreeRows(LogUniformGuidance):
    def __call__(self, n, rng):
        return super().__call__(n, rng).T


class Reversed(LogUniformGuidance):
    def __call__(self, n, rng):
        return super().__call__(n, rng)[:, [0, 2, 1]]


class Weak(LogUniformGuidance):
    def __call__(self, n, rng):
        return super().__call__(n, rng) - torch.tensor([0.5, 0.0, 0.0])


class Elsewhere(LogUniformGuidance):
    def __call__(self, n, rng):
        return super().__call__(n, rng) + torch.zeros(n, 3)


class Same(LogUniformGuidance):
    def __call__(self, n, rng):
        return super().__call__(n, torch.Generator().manual_seed(0))


class Careless(LogUniformGuidance):
    def __call__(self, n, rng):
        torch.randn(1)
        return super().__call__(n, rng)


WRONG_GUIDANCE = [
    (ThreeRows, "shapes and dtypes"),
    (Reversed, "scale >= 1, 0 <= low <= high <= 1"),
    (Weak, "scale >= 1, 0 <= low <= high <= 1"),
    (Same, "determined by rng"),
    (Careless, "global generators untouched"),
    (Elsewhere, "on the device of rng"),
]


@pytest.mark.parametrize("name", guidance_laws.names())
def test_registered_guidance_passes(name):
    assert not described(by_claim(guidance_laws, name))


@pytest.mark.parametrize(("cls", "claim"), WRONG_GUIDANCE)
def test_wrong_guidance_is_rejected(cls, claim):
    failure = first_failure(guidance_laws, cls)
    assert failure.claim == claim, failure
    assert failure.hint


def test_every_claim_rejects_a_wrong_guidance_first():
    assert {claim for _, claim in WRONG_GUIDANCE} == set(guidance_law.CLAIMS)
