"""What readouts mean: the start, the truth, derivatives, jumps in time, warm starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from backbone_cases import awake, inputs, small
from derivative_cases import ROUNDING, error
from torch import Tensor

import registry
from backbones import warm_start
from backbones.noise import VpNoise, vp_step
from backbones.parametrisations import EDM, Data, RawVelocity, ScaledByGuidance, Trig
from backbones.parametrisations.smoothness import check_smooth
from benchmarks.conformance.networks import OnPath
from registry.protocols import Call
from trainers.derivative_probe import probe_derivatives
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import OnePass
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.ops import like
from zoo.oracles import GaussianOracle
from zoo.paths import TrigFlow

NAMES = registry.parametrisations.names()
each = pytest.mark.parametrize("name", NAMES)
each_backbone = pytest.mark.parametrize("backbone", registry.backbones.names())
EXACT = {"atol": 1e-10, "rtol": 1e-10}  # float64, divisions by t and t - r of 1e-2 and more


def made(name: str, **settings):
    return registry.parametrisations.get(name)(**settings)


def guided(cond, n: int):
    """Conditions with a guidance scale of its own for each row."""
    scale = torch.linspace(1.5, 4.0, n)
    return {**cond, "guidance": torch.stack([scale, 0 * scale, 0 * scale + 1], 1)}


# the start


def _of_pair(x0: Tensor, x1: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The average velocity of the trigflow path through one pair of data and noise."""
    a, b = math.pi / 2 * like(t, x0), math.pi / 2 * like(r, x0)
    x_t, x_r = (angle.cos() * x0 + angle.sin() * x1 for angle in (a, b))
    return (x_t - x_r) / like(t - r, x0)


def _trig_start(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """F = 0: x0 and x1 are the best guesses for Gaussian data of standard deviation 1/2."""
    alpha, sigma = (math.pi / 2 * like(t, x)).cos(), (math.pi / 2 * like(t, x)).sin()
    variance = alpha**2 / 4 + sigma**2
    return _of_pair(alpha * x / 4 / variance, sigma * x / variance, t, r)


def _gaussian(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The exact velocity of Gaussian data of mean 0 and standard deviation 1/2."""
    zero = torch.zeros(x.shape[1:], dtype=torch.float64)
    return GaussianOracle(zero, zero + 0.5).velocity(x, t)


def _noise_start(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """No noise: what is seen is all data."""
    return -x / like(((1 - t) ** 2 + t**2).sqrt() * vp_step(t)[1], x)


STARTS = {
    "raw_velocity": lambda x, t, r: torch.zeros_like(x),
    "data": lambda x, t, r: x / like(t.clamp(min=0.05), x),
    "edm": _gaussian,
    "trig": _trig_start,
    "scaled_by_guidance": lambda x, t, r: torch.zeros_like(x),
    "vp_noise": _noise_start,
}


@each
@each_backbone
def test_every_network_starts_with_its_stated_velocity(backbone, name):
    net = small(backbone, ("u", "logvar"), parametrisation=made(name)).double()
    x, t, r, cond = inputs(backbone, dtype=torch.float64)
    out = net(x, t, r, guided(cond, len(x)))
    torch.testing.assert_close(out["u"], STARTS[name](x, t, r), **EXACT)
    assert not out["logvar"].any()


def test_raw_velocities_are_the_readouts_to_the_bit():
    net = awake(small("dit", ("u", "v", "logvar")))
    x, t, r, cond = inputs("dit")
    features, c = net.trunk(x, t, r, cond)
    out = net(x, t, r, cond)
    for key, readout in net.heads["dual_head"].readouts.items():
        assert out[key].equal(readout(features, c))


# the truth: at the exact readout the velocity is exact, by definitions that know no parametrisation


@dataclass
class Truth:
    """A Gaussian, its exact velocities at some points of a path, and the points."""

    x: Tensor
    t: Tensor
    r: Tensor
    v: Tensor
    u: Tensor
    posterior_mean: Tensor  # of the data

    @property
    def at(self) -> Call:
        return Call(self.x, self.t, self.r, {"guidance": torch.tensor([[3.0, 0.0, 1.0]] * 64)})


def truth(path=None) -> Truth:
    rng = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(64, 2, generator=rng, dtype=torch.float64)
    t = 0.06 + 0.93 * torch.rand(64, generator=rng, dtype=torch.float64)
    r = (0.9 * torch.rand(64, generator=rng, dtype=torch.float64) * t).where(t > 0.3, 0 * t)
    mean, std = torch.tensor([0.7, -1.2], dtype=torch.float64), torch.tensor([0.3, 1.4])
    oracle = GaussianOracle(mean, std.double())
    exact = oracle if path is None else OnPath(oracle, path)
    s, time = oracle.std, t[:, None]
    gain = (1 - time) * s**2 / ((1 - time) ** 2 * s**2 + time**2)
    x0 = mean + gain * (x - (1 - time) * mean)
    out = exact(x, t, r)
    return Truth(x, t, r, out["v"], out["u"], x0)


def _data(p, true, key):
    x0 = true.x - true.t[:, None] * true.u
    return x0 if key == "u" else true.posterior_mean


def _edm(p, true, key):
    """From the denoiser, by the paper's c_skip and c_out of sigma."""
    time, s = true.t[:, None], p.sigma_data
    sigma, noisy = time / (1 - time), true.x / (1 - time)
    denoised = _data(p, true, key)
    skip, out = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2).sqrt()
    return (denoised - skip * noisy) / out


def _trig(p, true, key):
    """From dy / dphi, or from the step between two angles, of y = cos(phi) x0 + s sin(phi) x1."""
    s = p.sigma_data

    def phi(t):
        return torch.atan2(torch.sin(math.pi / 2 * t), s * torch.cos(math.pi / 2 * t))

    def scale(t):
        return phi(t).cos() / torch.cos(math.pi / 2 * t)

    one = torch.ones_like(true.t)
    at, d_phi = torch.func.jvp(phi, (true.t,), (one,))
    k, d_k = torch.func.jvp(scale, (true.t,), (one,))
    y = like(k, true.x) * true.x
    if key == "v":
        d_y = like(d_k, y) * true.x + like(k, y) * true.v
        return d_y / like(s * d_phi, y)
    end = like(scale(true.r), y) * (true.x - like(true.t - true.r, y) * true.u)
    angle = like(at - phi(true.r), y)
    return (angle.cos() * y - end) / (s * angle.sin())


def _noise(p, true, key):
    velocity = true.u if key == "u" else true.v
    return true.x + (1 - true.t[:, None]) * velocity


READOUTS = {
    "raw_velocity": lambda p, true, key: true.u if key == "u" else true.v,
    "data": _data,
    "edm": _edm,
    "trig": _trig,
    "scaled_by_guidance": lambda p, true, key: (true.u if key == "u" else true.v) / 3,
    "vp_noise": _noise,
}


@pytest.mark.parametrize("key", ["u", "v"])
@each
def test_exact_readout_gives_the_exact_velocity(name, key):
    for settings in [{}, {"sigma_data": 1.3}] if name in ("edm", "trig") else [{}]:
        part = made(name, **settings)
        true = truth(TrigFlow() if name == "trig" else None)
        raw = READOUTS[name](part, true, key)
        exact = true.u if key == "u" else true.v
        torch.testing.assert_close(part(raw, key, true.at), exact, atol=1e-7, rtol=1e-7)
        # What another parametrisation would call exact is not.
        other = READOUTS["data" if name != "data" else "edm"](EDM(), true, key)
        assert (part(other, key, true.at) - exact).abs().max() > 0.1
        if name != "raw_velocity":
            assert (part(-raw, key, true.at) - exact).abs().max() > 0.1


def test_trig_is_the_consistency_function_of_scm():
    """At sigma_data = 1 and r = 0: F = (t u - (1 - cos) x) / sin, with the angle pi t / 2."""
    true = truth(TrigFlow())
    at = Call(true.x, true.t, 0 * true.t, None)
    raw = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, angle, t = Trig(sigma_data=1.0)(raw, "u", at), math.pi / 2 * true.t[:, None], true.t[:, None]
    torch.testing.assert_close((t * u - (1 - angle.cos()) * true.x) / angle.sin(), raw, **EXACT)


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_trig_has_limits_at_both_ends_and_at_r_equal_to_t(sigma_data):
    part = Trig(sigma_data=sigma_data)
    x, raw = torch.ones(3, 2, dtype=torch.float64), torch.full((3, 2), -0.7, dtype=torch.float64)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    v = part(raw, "v", Call(x, t, 0 * t, None))
    assert v.isfinite().all()
    assert part(raw, "u", Call(x, t, t, None)).equal(v)
    near = part(raw, "u", Call(x, t, t - 1e-6, None))
    torch.testing.assert_close(near, v, atol=1e-5, rtol=0)
    assert (part(raw, "u", Call(x, t, t - 0.4, None)) - v).abs().min() > 1e-2


def test_edm_is_trig_with_the_other_sign_on_the_linear_path():
    """Both stand for the same pair of data and noise, at the same ratio of noise to data."""
    x, raw = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = math.pi / 2 * torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    time, scale = angle.sin() / (angle.cos() + angle.sin()), angle.cos() + angle.sin()
    on_line, on_circle = (Call(z, t, 0 * t, None) for z, t in (
        (x / scale[:, None], time), (x, angle / (math.pi / 2))))  # fmt: skip
    x0 = x / scale[:, None] - time[:, None] * EDM()(raw, "v", on_line)
    v = Trig()(-raw, "v", on_circle)
    expected = TrigFlow().to_x0(x, v, angle / (math.pi / 2))
    torch.testing.assert_close(x0, expected, **EXACT)


def test_edm_shows_the_trunk_what_its_paper_does():
    t = torch.tensor([0.2, 0.5, 0.9, 0.0, 1.0], dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = EDM().inputs(Call(x, t, 0.5 * t, {"label": t}))
    sigma = t[:3] / (1 - t[:3])
    noisy = x[:3] / (1 - t[:3, None])
    torch.testing.assert_close(seen.x[:3], noisy / (sigma[:, None] ** 2 + 0.25).sqrt(), **EXACT)
    torch.testing.assert_close(seen.t[:3], sigma.log() / 4, **EXACT)
    assert seen.t[3:].tolist() == pytest.approx([math.log(0.002) / 4, math.log(80) / 4])
    again = EDM().inputs(Call(x, 0.5 * t, 0.5 * t, None))
    assert again.t.equal(again.r)
    assert seen.r.equal(again.t)
    assert seen.cond == {"label": t}


def test_data_below_t_min_is_another_readout_of_the_same_velocity():
    x, u = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.01, 0.04, 0.05], dtype=torch.float64)
    at = Call(x, t, 0 * t, None)
    torch.testing.assert_close(Data()(x - 0.05 * u, "u", at), u, **EXACT)
    biased = Data()(x - t[:, None] * u, "u", at)  # the data themselves: right from t_min on
    torch.testing.assert_close(biased, u * (t / 0.05)[:, None], **EXACT)


def test_scale_counts_where_there_is_one():
    raw, t = torch.ones(2, 3), torch.zeros(2)
    for cond in (None, {"label": torch.zeros(2)}):
        assert ScaledByGuidance()(raw, "u", Call(raw, t, t, cond)) is raw
    cond = {"guidance": torch.tensor([[2.0, 0.4, 0.6], [1.0, 0.0, 1.0]])}
    assert ScaledByGuidance()(raw, "u", Call(raw, t, t, cond))[:, 0].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (lambda: Data(t_min=0.0), "data.t_min = 0.0 must be above 0"),
        (lambda: EDM(sigma_data=-1.0), "edm.sigma_data = -1.0 must be a number above 0"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "edm.sigma_min = 2.0 must be .* below"),
        (lambda: Trig(sigma_data=math.inf), "trig.sigma_data = inf"),
    ],
)
def test_settings_without_a_meaning_are_refused(part, said):
    with pytest.raises(ValueError, match=said):
        part()


# derivatives


@each
@each_backbone
def test_derivatives_agree_through_each_on_every_backbone(backbone, name):
    net = awake(small(backbone, ("u", "v"), parametrisation=made(name)))
    x, t, r, cond = inputs(backbone)
    cond = guided(cond, len(x))
    tangents = (torch.randn_like(x), torch.ones_like(t), torch.full_like(r, -0.5))
    t = t.clamp(0.2, 0.9)  # DiT's process ends at 0.9937, where it bends
    point = (x, t, r.minimum(0.9 * t).clamp(min=0.02))
    fn = lambda *at: net(*at, cond)  # noqa: E731
    plain = fn(*point)
    expected = Dual()(lambda *at: fn(*at)["u"], point, tangents)
    assert error(Jvp()(lambda *at: fn(*at)["u"], point, tangents), expected) < ROUNDING
    out, found = OnePass().with_value(fn, point, tangents, "u")
    assert error(found, expected) < ROUNDING
    assert out["u"].equal(plain["u"])
    later, along = OnePass().linearized(fn, point, "u")
    assert error(along(tangents), expected) < ROUNDING
    assert later["v"].equal(plain["v"])
    net.double()
    wide = [[value.double() for value in values] for values in (point, tangents)]
    difference = FiniteDifference(step=1e-4)(lambda *at: fn(*at)["u"], *wide)
    assert error(difference, expected) < 1e-4


@each
def test_probe_passes_what_ships(name):
    net = small("mlp", ("u", "v"), parametrisation=made(name))
    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert probe_derivatives(MeanFlow(derivative=Dual()), net, x0)["derivative_error"] < ROUNDING


@dataclass(frozen=True)
class Cut:
    """A data prediction that cuts the tangent of t."""

    def __call__(self, raw, key, at):
        return (at.x - raw) / like(at.t.detach().clamp(min=0.05), raw)


@dataclass(frozen=True)
class Jumps:
    """Twice the velocity near the data."""

    scale: float = 2.0

    def __call__(self, raw, key, at):
        return raw * like(torch.where(at.t < 0.123, self.scale, 1.0).to(raw.dtype), raw)


@dataclass(frozen=True)
class Rounded:
    """Times in steps, as a table of embeddings would have them."""

    def __call__(self, raw, key, at):
        return raw

    def inputs(self, at):
        return Call(at.x, (at.t * 10).round() / 10, at.r, at.cond)


@dataclass(frozen=True)
class Unbounded:
    """A quotient without a bound, at a time in the middle."""

    def __call__(self, raw, key, at):
        return raw / like((at.t - 0.5).abs(), raw)


@dataclass(frozen=True)
class Bends:
    """Continuous, with a corner and a steep slope."""

    def __call__(self, raw, key, at):
        return raw * like((20 * (at.t - 0.3)).clamp(-1, 1), raw)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Cut(), "along t its relative error"),
        (Jumps(), "'mine': the velocity 'u' jumps at t = 0.123"),
        (Jumps(scale=1.02), "the velocity 'u' jumps at t = 0.123"),
        (Rounded(), "the trunk's t jumps at t = 0"),
        (Unbounded(), "the velocity 'u' is not finite at t = 0.5"),
        (Bends(), None),
    ],
)
def test_parametrisation_that_no_derivative_can_pass_is_found_before_training(part, said):
    net = small("mlp", ("u",), parametrisation=part)
    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with registry.parametrisations.temporary("mine", type(part)):
        if said is None:
            probe_derivatives(MeanFlow(derivative=Dual()), net, x0)
            return
        with pytest.raises(ValueError, match=said):
            probe_derivatives(MeanFlow(derivative=Dual()), net, x0)
        assert probe_derivatives(FlowMatching(), net, x0) == {}  # differentiates nothing


@each
def test_what_ships_is_smooth_for_both_velocities(name):
    for key in ("u", "v"):
        check_smooth(made(name), key, (3, 4, 6), {"guidance": torch.tensor([[2.0, 0.3, 0.6]] * 2)})


# warm starts


@each
def test_student_of_the_same_parametrisation_starts_as_its_teacher(name):
    teacher = awake(small("mlp", ("v",), parametrisation=made(name)))
    student = small("mlp", ("u", "v"), seed=7, parametrisation=made(name))
    x, t, r, cond = inputs("mlp")
    cond = guided(cond, len(x))
    before = student(x, t, r, cond)["v"]
    warm_start(student, teacher)
    expected, out = teacher(x, t, t, cond)["v"], student(x, t, t, cond)
    assert not torch.allclose(before, expected)
    assert out["v"].equal(expected)
    torch.testing.assert_close(out["u"], expected, atol=1e-6, rtol=1e-5)
    later = student(x, t, r, cond)["u"]
    if name == "trig":  # u is the average over a step of the circle
        assert not torch.allclose(later, expected, atol=1e-2)
    elif name not in ("edm", "vp_noise"):  # whose second time is not r
        assert later.equal(expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (RawVelocity(), Data(), r"is raw_velocity\(\), the teacher's data\(t_min=0.05\)"),
        (Data(), RawVelocity(), r"is data\(t_min=0.05\), the teacher's raw_velocity\(\)"),
        (Data(t_min=0.1), Data(), r"is data\(t_min=0.1\), the teacher's data\(t_min=0.05\)"),
        (EDM(), VpNoise(), r"is edm\(sigma_data=0.5, .*the teacher's vp_noise\(\)"),
    ],
)
def test_student_refuses_a_teacher_whose_readouts_mean_something_else(ours, theirs, said):
    teacher, student = (small("mlp", ("v",), parametrisation=p) for p in (theirs, ours))
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(ValueError, match=said) as refused:
        warm_start(student, teacher)
    assert "Bind run.parametrisation to the teacher's" in str(refused.value)
    assert all(value.equal(weights[name]) for name, value in student.state_dict().items())
