"""Each identity vanishes at the oracles, and each planted mistake makes it large."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from registry import derivatives
from zoo.derivatives.methods import Dual, FiniteDifference
from zoo.ops import like
from zoo.oracles import GaussianOracle, MixtureOracle, Perturbed, identities

F64 = torch.float64

GAUSSIAN = GaussianOracle([0.7, -1.5], [0.3, 1.7])
MIXTURE = MixtureOracle(
    [[1.5, 0.0], [-1.0, 1.2], [-0.4, -1.4]],
    [[0.2, 0.3], [0.5, 0.25], [0.3, 0.6]],
    [0.2, 0.5, 0.3],
    labels=[0, 1, 0],
)
ORACLES = {"gaussian": GAUSSIAN, "mixture": MIXTURE}

DIFFERENTIAL = {
    "mean_flow": identities.mean_flow,
    "improved_mean_flow": identities.improved_mean_flow,
    "eulerian": identities.eulerian,
    "lagrangian": identities.lagrangian,
    "n2n": partial(identities.n2n, lam=0.5, gam=1.0),
    "n2n_equal": partial(identities.n2n, lam=1.0, gam=1.0),
    "n2n_eulerian": partial(identities.n2n, lam=0.0, gam=1.0),
    "n2n_lagrangian": partial(identities.n2n, lam=1.0, gam=0.0),
}
ALGEBRAIC = {
    "semigroup": identities.semigroup,
    "semigroup_late": partial(identities.semigroup, fraction=0.9),
    "shortcut": identities.shortcut,
    "alpha_flow": identities.alpha_flow,
    "alpha_flow_small": partial(identities.alpha_flow, alpha=0.05),
}
EXACT = DIFFERENTIAL | ALGEBRAIC
BASIC = ("mean_flow", "improved_mean_flow", "eulerian", "lagrangian", "n2n")
BASIC += ("semigroup", "shortcut", "alpha_flow")

each_oracle = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES.keys())
each_basic = pytest.mark.parametrize("identity", [EXACT[name] for name in BASIC], ids=BASIC)


def points(oracle, n=10, seed=0):
    """x_t on the path; the first rows have r = t, t = 1, r = 0, and both ends."""
    rng = torch.Generator().manual_seed(seed)
    t = 0.05 + 0.95 * torch.rand(n, generator=rng, dtype=F64)
    r = t * torch.rand(n, generator=rng, dtype=F64)
    r[0], t[1], r[2], t[3], r[3] = t[0], 1, 0, 1, 0
    x0 = oracle.sample_x0(n, rng)
    x = like(1 - t, x0) * x0 + like(t, x0) * torch.randn(x0.shape, generator=rng, dtype=F64)
    return x, t, r


def at(t, r, oracle=GAUSSIAN, n=16):
    """States at one pair of times."""
    rng = torch.Generator().manual_seed(1)
    x0 = oracle.sample_x0(n, rng)
    x = (1 - t) * x0 + t * torch.randn(x0.shape, generator=rng, dtype=F64)
    return x, torch.full((n,), t, dtype=F64), torch.full((n,), r, dtype=F64)


def largest(residual):
    return float(residual.abs().max())


# The map of a mixture takes a solver: at one, by default, each identity with one choice of weights.
@pytest.mark.parametrize(
    ("identity", "oracle"),
    [
        pytest.param(
            *(identity, oracle),
            id=f"{name}-{law}",
            marks=pytest.mark.slow if law == "mixture" and name not in BASIC else (),
        )
        for law, oracle in ORACLES.items()
        for name, identity in EXACT.items()
    ],
)
def test_identity_holds_at_the_oracle(oracle, identity):
    """Closed forms to rounding, the mixture to its solver's 1e-10, magnified by at most dX/dx."""
    residual = identity(oracle, *points(oracle))
    assert residual.shape == (10, 2)
    assert largest(residual) < (1e-12 if oracle is GAUSSIAN else 1e-8)


@pytest.mark.parametrize(
    "name", ["mean_flow", pytest.param("lagrangian", marks=pytest.mark.slow), "shortcut"]
)
def test_identity_holds_within_a_class(name):
    """`given` binds the label: with the velocity of the class goes its own flow map, no other."""
    label = torch.tensor([0, 1] * 5)
    net = identities.given(MIXTURE, {"label": label})
    x, t, r = points(MIXTURE)
    identity = EXACT[name]
    assert largest(identity(net, x, t, r)) < 1e-8

    def crossed(x, t, r, cond):  # the velocity of the classes, the average velocity of all
        return {"u": MIXTURE(x, t, r)["u"], "v": MIXTURE(x, t, r, {"label": label})["v"]}

    if name in DIFFERENTIAL:
        assert largest(identity(crossed, x, t, r)) > 0.5


@each_basic
@pytest.mark.parametrize("key", ["u", "v"])
def test_identity_notices_a_perturbed_output(identity, key):
    """Those that compose u alone cannot see v."""
    x, t, r = points(GAUSSIAN)
    residual = identity(Perturbed(GAUSSIAN, 0.1, key), x, t, r)
    if key == "v" and identity in ALGEBRAIC.values():
        assert largest(residual) < 1e-12
    else:
        assert largest(residual) > 0.02


@pytest.mark.parametrize("backend", derivatives.names())
@pytest.mark.parametrize("identity", DIFFERENTIAL.values(), ids=DIFFERENTIAL.keys())
def test_identity_accepts_every_derivative(identity, backend):
    x, t, r = at(0.7, 0.3)
    # Central differences with the step 1e-3: an error of 1e-6 / 6 times a third derivative.
    tolerance = 1e-4 if backend == "finite_difference" else 1e-12
    assert largest(identity(GAUSSIAN, x, t, r, derivative=derivatives.build(backend))) < tolerance


# Negative controls at (t, r) = (.9, .2): mistakes that a derivative or a network can carry.


def with_tangents(choose):
    """A derivative that replaces the tangents (a, b, c) by choose(a, b, c)."""
    return lambda fn, primals, tangents: Dual()(fn, primals, choose(*tangents))


MISTAKES = {
    "r for t": with_tangents(lambda a, b, c: (a, c, b)),
    "both times": with_tangents(lambda a, b, c: (a, b + c, b + c)),
    "no time": with_tangents(lambda a, b, c: (a, 0 * b, 0 * c)),
    "no velocity": with_tangents(lambda a, b, c: (0 * a, b, c)),
    "reversed": with_tangents(lambda a, b, c: (-a, -b, -c)),
    "dropped": with_tangents(lambda a, b, c: (0 * a, 0 * b, 0 * c)),
}


@pytest.mark.parametrize("identity", DIFFERENTIAL)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_tangents_are_noticed(identity, mistake):
    invisible = {
        "eulerian": ("reversed", "dropped"),  # the derivative is zero itself
        "lagrangian": ("no velocity",),  # and so is its tangent
        "n2n_lagrangian": ("no velocity",),
    }
    derivative = MISTAKES[mistake]
    residual = DIFFERENTIAL[identity](GAUSSIAN, *at(0.9, 0.2), derivative=derivative)
    if mistake in invisible.get(identity, ()):
        assert largest(residual) < 1e-12
    else:
        assert largest(residual) > 0.5


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES.keys())
def test_swapped_weights_are_noticed_by_n2n(oracle):
    """Tangents (lam v, lam, -gam), as one source prints them, hold for lam = gam alone."""

    def swapped(fn, primals, tangents):
        a, b, c = tangents
        return Dual()(fn, primals, (a * 0.5, b * 0.5, c * 2))  # from (1, 1, -.5): lam=.5, gam=1

    residual = identities.n2n(oracle, *at(0.9, 0.2, oracle), 0.5, 1.0, derivative=swapped)
    assert largest(residual) > 0.5


@each_basic
def test_gap_in_place_of_r_is_noticed(identity):
    def fed_h(x, t, r, cond):
        return {"u": GAUSSIAN(x, t, t - r)["u"], "v": GAUSSIAN(x, t, t)["v"]}

    assert largest(identity(fed_h, *at(0.9, 0.2))) > 0.2


@each_basic
def test_flipped_velocity_is_noticed(identity):
    """A network trained towards the data, -u and -v, is not a solution."""

    def flipped(x, t, r, cond):
        return {key: -value for key, value in GAUSSIAN(x, t, r).items()}

    assert largest(identity(flipped, *at(0.9, 0.2))) > 0.2


@each_basic
def test_instantaneous_velocity_is_no_average_velocity(identity):
    """u := v* meets no identity: a method that ignores r is noticed."""

    def ignores_r(x, t, r, cond):
        v = GAUSSIAN(x, t, t)["v"]
        return {"u": v, "v": v}

    assert largest(identity(ignores_r, *at(0.9, 0.2))) > 0.2


@each_basic
def test_network_without_v_uses_u_on_the_diagonal(identity):
    def one_head(x, t, r, cond):
        return {"u": GAUSSIAN(x, t, r)["u"]}

    assert largest(identity(one_head, *points(GAUSSIAN))) < 1e-12


@pytest.mark.parametrize("eps", [0.1, -0.1])
@pytest.mark.parametrize(
    ("identity", "tolerance"),
    [
        (identities.mean_flow, 1e-12),
        (identities.improved_mean_flow, 1e-12),
        (partial(identities.n2n, lam=0.5, gam=1.0), None),
        (partial(identities.dumo_fd, delta=1e-4, order=1), 1e-3),  # O(delta)
    ],
    ids=["mean_flow", "improved_mean_flow", "n2n", "dumo_fd"],
)
def test_residual_has_the_sign_of_a_constant_error(identity, tolerance, eps):
    """pred - target: descending it brings u back. v and the diagonal, hence the direction, stay."""
    x, t, r = at(0.9, 0.2)

    def shifted(x, t, r, cond):
        out = GAUSSIAN(x, t, r)
        return {"u": out["u"] + eps * like((t > r).to(x), x), "v": out["v"]}

    change = identity(shifted, x, t, r) - identity(GAUSSIAN, x, t, r)
    assert (change * eps > 0).all()
    if tolerance is not None:  # a flat shift has no derivative, so it arrives unchanged
        assert largest(change - eps) < tolerance


@pytest.mark.parametrize(
    ("oracle", "order"),
    [
        *((GAUSSIAN, order) for order in (1, 2, 4)),
        *((MIXTURE, 2), pytest.param(MIXTURE, 4, marks=pytest.mark.slow)),
    ],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_dumo_finite_difference_is_first_order(oracle, order):
    """The bias at the truth is O(delta), the same for every number of steps."""
    x, t, r = at(0.9, 0.2, oracle)
    coarse, fine = (identities.dumo_fd(oracle, x, t, r, d, order) for d in (2e-3, 1e-3))
    ratio = coarse.norm() / fine.norm()
    assert abs(ratio - 2) < 0.2
    # Composing the exact map is exact: 1e-10 of the solver over delta.
    assert largest(fine - identities.dumo_fd(oracle, x, t, r, 1e-3, 1)) < 1e-6


def wrong(x, t, r, cond):
    """A smooth network that solves nothing."""
    u = torch.sin(x + like(t, x)) * like(1 + r, x) + like(t * r, x)
    return {"u": u, "v": torch.cos(x) + like(t, x)}


def test_dumo_finite_difference_tends_to_mean_flow():
    """Also away from the truth, where neither vanishes."""
    x, t, r = at(0.9, 0.2)
    exact = identities.mean_flow(wrong, x, t, r)
    errors = [largest(identities.dumo_fd(wrong, x, t, r, d, 1) - exact) for d in (2e-3, 1e-3)]
    assert errors[1] < 0.02 < largest(exact)
    assert abs(errors[0] / errors[1] - 2) < 0.2


def test_dumo_finite_difference_is_flow_matching_within_delta():
    x, t, r = at(0.9, 0.895)
    r[0] = t[0]
    out = wrong(x, t, r, None)
    residual = identities.dumo_fd(wrong, x, t, r, 0.01, 2)
    torch.testing.assert_close(residual, out["u"] - out["v"], atol=1e-12, rtol=1e-12)


@each_oracle
def test_alpha_flow_with_the_velocity_is_first_order(oracle):
    x, t, r = at(0.9, 0.2, oracle)
    coarse, fine = (identities.alpha_flow_limit(oracle, x, t, r, a) for a in (4e-3, 2e-3))
    assert abs(coarse.norm() / fine.norm() - 2) < 0.2


def test_alpha_flow_tends_to_mean_flow():
    """Also away from the truth: the same residual."""
    x, t, r = at(0.9, 0.2)
    exact = identities.mean_flow(wrong, x, t, r)
    errors = [largest(identities.alpha_flow_limit(wrong, x, t, r, a) - exact) for a in (2e-3, 1e-3)]
    assert errors[1] < 0.02 < largest(exact)
    assert abs(errors[0] / errors[1] - 2) < 0.2


@pytest.mark.parametrize("r", [0.0, 0.35, 0.7])
def test_improved_mean_flow_has_the_floor_of_flow_matching_whatever_r(r):
    """E (V - v_c)^2 = s^2 / S_t^2, V being u + (t - r) D(u; v, 1, 0): in standard errors."""
    n, t = 20_000, 0.7
    rng = torch.Generator().manual_seed(0)
    x0 = GAUSSIAN.sample_x0(n, rng)
    x1 = torch.randn(x0.shape, generator=rng, dtype=F64)
    x, times = (1 - t) * x0 + t * x1, torch.full((n,), t, dtype=F64)
    residual = identities.improved_mean_flow(GAUSSIAN, x, times, torch.full_like(times, r))
    excess = (residual + GAUSSIAN.velocity(x, times) - (x1 - x0)) ** 2
    excess = excess - GAUSSIAN.std**2 / ((1 - t) ** 2 * GAUSSIAN.std**2 + t**2)
    assert (excess.mean(0).abs() < 4 * excess.std(0) / n**0.5).all()


def test_identities_of_one_network_agree_with_each_other():
    """Away from the truth: n2n is the sum of its ends, which are the other two, up to sign."""
    x, t, r = at(0.9, 0.2)
    parts = [identities.n2n(wrong, x, t, r, lam, gam) for lam, gam in ((1, 0), (0, 1), (0.5, 2))]
    torch.testing.assert_close(0.5 * parts[0] + 2 * parts[1], parts[2], atol=1e-12, rtol=1e-12)
    mean_flow = identities.mean_flow(wrong, x, t, r)
    torch.testing.assert_close(parts[1], mean_flow, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(identities.eulerian(wrong, x, t, r), -mean_flow, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        identities.lagrangian(wrong, x, t, r), parts[0], atol=1e-12, rtol=1e-12
    )


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_semigroup_stops_at_its_fraction_of_the_way(fraction):
    """At the truth every stop will do; elsewhere its place decides what is measured."""
    x, t, r = at(0.9, 0.2)
    calls = set()

    def recorded(x, t, r, cond):
        calls.add((round(float(t[0]), 9), round(float(r[0]), 9)))
        return wrong(x, t, r, cond)

    identities.semigroup(recorded, x, t, r, fraction)
    m = round(0.9 - fraction * 0.7, 9)
    assert calls == {(0.9, m), (m, 0.2), (0.9, 0.2)}


def test_finite_difference_step_bounds_the_residual():
    """Halving the step quarters it: what remains at the oracle is the difference's own error."""
    x, t, r = at(0.7, 0.3)
    sizes = [
        largest(identities.mean_flow(GAUSSIAN, x, t, r, derivative=FiniteDifference(step=step)))
        for step in (2e-2, 1e-2)
    ]
    assert abs(sizes[0] / sizes[1] - 4) < 0.4
