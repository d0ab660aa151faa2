"""DE-CM: the loss computed a second time, both ends' tangents, schedules, guidance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import noise_of, watch

from benchmarks.conformance import fixed_point
from benchmarks.conformance.networks import ExactNetwork, Tapped, Toy
from benchmarks.conformance.subject import GAUSSIAN, MIXTURE, Subject, law_batch, random_batch
from registry.protocols import NULL_LABEL
from zoo.derivatives.methods import Dual
from zoo.objectives.decm import DECM
from zoo.ops import like
from zoo.oracles import identities
from zoo.teachers import EmaTeacher, Frozen
from zoo.times import LogitNormal, Stratified

F64 = torch.float64


def second_opinion(seen, objective, teacher=None):
    """Each cluster from its own forward; `teacher` is None without distillation."""
    n, call = len(seen.batch), seen.trained()
    clusters = [
        (call.x[rows], call.t[rows].double(), call.r[rows].double(), call.labels[rows])
        for rows in (slice(i, i + n) for i in range(0, len(call.x), n))
    ]
    scale, limit = objective.guidance_scale, objective.guidance_limit
    x, t, _, label = clusters[0]
    zero, one, null = torch.zeros(n, dtype=F64), torch.ones(n, dtype=F64), label * 0 + NULL_LABEL
    x1 = noise_of(call.x[:n], call.t[:n], seen.batch.x0)

    def u(x, t, r, label=label, net=seen.net):
        return net(x, t, r, {"label": label})["u"]

    def clipped(g):
        return g.clamp(-objective.clip, objective.clip)

    def limited(dv):
        return dv * (limit / dv.square().mean(1).sqrt()).clamp_max(1)[:, None]

    def velocity(x, t):
        if teacher is None:
            return u(x, t, t).detach()
        v = u(x, t, t, net=teacher)
        dv = limited(v - u(x, t, t, null, net=teacher))
        return (v + (scale - 1) * torch.where((label == null)[:, None], 0, dv)).detach()

    v = velocity(x, t)
    anchor = v
    if teacher is None:
        dv = limited(u(x, t, t) - u(x, t, t, null))
        guided = (x1 - seen.batch.x0) + (1 - 1 / scale) * dv.detach()
        anchor = torch.where((label == null)[:, None], x1 - seen.batch.x0, guided)

    _, du = torch.func.jvp(u, (x, t, zero), (v, one, zero))
    u_0, u_t = u(x, t, zero), u(x, t, t)
    g = (u_0 - v + like(t, x) * du).detach()
    step = like(1 - (1 - t) ** 0.5, x) * clipped(g)
    error = ((u_0 - (u_0 - step).detach()) ** 2).mean(1)
    loss = (math.pi / 2 * t).sin() * error / (error.detach() + 1e-3) ** 0.5
    squares = ((u_t - anchor) ** 2).mean(1)
    cosine = (u_t * anchor).sum(1) / (u_t.norm(dim=1) * anchor.norm(dim=1))
    loss = loss + objective.fm_weight * (squares + objective.cosine_weight * (1 - cosine))
    raw = {"consistency": (g**2).mean(1), "v": squares.detach()}
    if len(clusters) == 3:
        x, t, r, _ = clusters[2]
        v_1, u_n, gap = velocity(x, t), u(x, t, r), like(t - r, x)
        v_2 = velocity(x - gap * u_n.detach(), r)
        lam, gamma = objective.lam, objective.gamma
        _, du = torch.func.jvp(u, (x, t, r), (gamma * v_1, gamma * one, -lam * one))
        g = ((lam + gamma) * u_n - lam * v_2 - gamma * v_1 + gap * du).detach()
        loss = loss + objective.n2n_weight * ((u_n - (u_n - clipped(g)).detach()) ** 2).mean(1)
        raw["n2n"] = (g**2).mean(1)
    return loss, raw


SETTINGS = {
    "default": {},
    "weights": {"lam": 0.3, "gamma": 0.8, "n2n_weight": 0.7, "fm_weight": 0.6, "clip": 0.4},
    "guided": {"guidance_scale": 1.75, "guidance_limit": 0.2},
    "cosine": {"cosine_weight": 1.0, "n2n_every": 0},
}


def cosine_term(seen, objective, over_sample=False):
    """FACM's: 1 - cos over the channels of each position, then the mean over positions."""
    x, t, _ = clusters_of(seen)[0]
    label = {"label": seen.trained().labels[: len(x)]}
    u, v = seen.net(x, t, t, label)["u"], objective.teacher.network(x, t, t, label)["u"].detach()
    if over_sample:
        u, v = u.flatten(1), v.flatten(1)
    u, v = u.flatten(2) if u.ndim > 2 else u[:, :, None], v.reshape(*v.shape[:2], -1)
    return (1 - (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))).mean(1)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5), (6,)], ids=["picture", "sequence", "vector"])
def test_cosine_is_over_the_channels_of_each_position(shape):
    """Value and gradient; over the whole sample both differ, unless the sample is one vector."""
    objective = DECM(teacher=Frozen(), cosine_weight=1.0, n2n_every=0, label_dropout=0.0)
    objective.teacher.attach(Toy(shape, ("u",), seed=5))
    seen = watch(objective, shape=shape)
    plain = watch(replace(objective, cosine_weight=0.0), shape=shape)
    term = seen.out.per_sample - plain.out.per_sample
    change = seen.gradient() - plain.gradient()
    torch.testing.assert_close(term, cosine_term(seen, objective), rtol=1e-5, atol=1e-6)
    wanted = seen.gradient(cosine_term(seen, objective))
    assert float((change - wanted).norm() / wanted.norm()) < 1e-5
    whole = seen.gradient(cosine_term(seen, objective, over_sample=True))
    assert (float((change - whole).norm() / wanted.norm()) < 1e-5) == (len(shape) == 1)
    assert float((whole - wanted).norm() / wanted.norm()) > 0.05 or len(shape) == 1


def test_cosine_over_one_channel_moves_no_weight():
    """It is the sign of u v there, as the docstring says."""
    objective = DECM(teacher=Frozen(), cosine_weight=1.0, n2n_every=0)
    objective.teacher.attach(Toy((1, 4, 4), ("u",), seed=5))
    seen = watch(objective, shape=(1, 4, 4))
    plain = watch(replace(objective, cosine_weight=0.0), shape=(1, 4, 4))
    torch.testing.assert_close(seen.gradient(), plain.gradient(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distilled", [False, True], ids=["scratch", "distilled"])
@pytest.mark.parametrize("step", [0, 1, 6000])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_agrees_cluster_by_cluster(name, step, distilled):
    objective = DECM(label_dropout=0.3, times=LogitNormal(), **SETTINGS[name])
    teacher = None
    if distilled:
        objective = replace(objective, teacher=Frozen())
        objective.teacher.attach(teacher := Toy((2,), ("u",), seed=5))
    seen = watch(objective, n=24, step=step)
    loss, raw = second_opinion(seen, objective, teacher)
    seen.agrees(loss)
    assert set(seen.out.terms) == set(raw)
    for key, rows in raw.items():
        torch.testing.assert_close(seen.out.terms[key], rows, rtol=1e-5, atol=1e-6)
    dropped = seen.trained().labels[:24] == NULL_LABEL
    assert 0 < dropped.sum() < 24


def clusters_of(seen):
    n, call = len(seen.batch), seen.trained()
    return [(call.x[i : i + n], call.t[i : i + n], call.r[i : i + n]) for i in
            range(0, len(call.x), n)]  # fmt: skip


def test_clusters_are_data_instant_and_noise():
    seen = watch(DECM(), n=64, labels="none")
    (x_t, t_t, r_t), (x_0, t_0, r_0), (x_n, t_n, r_n) = clusters_of(seen)
    assert (r_0 == 0).all()
    assert torch.equal(t_t, r_t)
    assert torch.equal(t_0, t_t)
    assert torch.equal(x_0, x_t)
    assert (t_n == torch.tensor(0.9)).all()
    x1 = noise_of(x_0, t_0, seen.batch.x0)
    mixed = like(1 - t_n, x1) * seen.batch.x0 + like(t_n, x1) * x1
    torch.testing.assert_close(x_n, mixed, rtol=1e-5, atol=1e-5)  # its own pair, other times
    # One time in each of 64 bins, for t and, up to the factor t_n, for r.
    for times in (t_0, r_n / t_n):
        assert torch.equal((times * 64).floor().sort().values, torch.arange(64.0))
    assert (t_0 - r_n / t_n).abs().max() > 0.1  # draws of their own


def test_noise_to_noisy_cluster_comes_every_third_step():
    for every, wanted in ((3, [True, False, False, True]), (1, [True] * 4), (0, [False] * 4)):
        seen = [watch(DECM(n2n_every=every), step=step) for step in range(4)]
        assert [len(clusters_of(one)) == 3 for one in seen] == wanted
        assert ["n2n" in one.out.terms for one in seen] == wanted


def test_start_time_rises_to_exactly_one():
    objective = DECM()
    times = [objective.start_time(step) for step in (0, 10_000, 20_000, 10**9)]
    assert times == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert times[2] == times[3] == 1.0
    assert DECM(start_gap=0.0).start_time(0) == 1.0
    assert DECM(start_decay_steps=0).start_time(1) == 1.0


@pytest.mark.parametrize("lam_gamma", [(0.5, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_noise_to_noisy_residual_is_the_identity(lam_gamma):
    """The one of zoo/oracles/identities, for whatever network; its velocity is u(x, t, t)."""
    lam, gamma = lam_gamma
    objective = DECM(lam=lam, gamma=gamma)
    seen = watch(objective, labels="none")
    x, t, r = clusters_of(seen)[2]
    residual = identities.n2n(seen.net, x, t.double(), r.double(), lam, gamma)
    torch.testing.assert_close(seen.out.terms["n2n"], (residual**2).mean(1), rtol=1e-5, atol=1e-6)
    x, t, zero = clusters_of(seen)[1]
    residual = identities.mean_flow(seen.net, x, t.double(), zero.double())
    torch.testing.assert_close(
        seen.out.terms["consistency"], (residual**2).mean(1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("swap", [False, True])
def test_noise_to_noisy_residual_is_equation_15(swap):
    """-g = gamma df/dt - lam df/dr + lam v(f, r) of the map f itself, for whatever network."""
    lam, gamma = 0.3, 0.8
    seen = watch(DECM(lam=lam, gamma=gamma), labels="none")
    x, t, r = clusters_of(seen)[2]
    t, r, one = t.double(), r.double(), torch.ones(len(x), dtype=F64)

    def f(x, t, r):
        return x - like(t - r, x) * seen.net(x, t, r, None)["u"]

    def v(x, t):
        return seen.net(x, t, t, None)["u"]

    point, moving_t = (x, t, r), (v(x, t), one, 0 * one)
    end, along_t = torch.func.jvp(f, point, moving_t)
    _, along_r = torch.func.jvp(f, point, (0 * x, 0 * one, one))
    first, second = (lam, gamma) if swap else (gamma, lam)
    printed = first * along_t - second * (along_r - v(end, r))
    agrees = torch.allclose(seen.out.terms["n2n"], (printed**2).mean(1), rtol=1e-5, atol=1e-6)
    assert agrees == (not swap)


def swapped(fn, primals, tangents):
    """From (gamma v, gamma, -lam) to (lam v, lam, -gamma), at lam = .5 and gamma = 1."""
    a, b, c = tangents
    return Dual()(fn, primals, (a / 2, b / 2, c * 2) if c.any() else tangents)


@pytest.mark.parametrize("law", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_swapped_ends_are_no_fixed_point(law):
    batch, net = law_batch(law, 128, 0), ExactNetwork(law, ("u",))

    def largest(derivative):
        objective = DECM(derivative=derivative, label_dropout=0.0)
        out = objective.loss(net, batch, torch.Generator().manual_seed(0))
        return float(out.terms["n2n"].max().sqrt())

    assert largest(Dual()) < 1e-3  # the mixture's flow map is integrated to 1e-5
    assert largest(swapped) > 0.5


def test_distilled_velocities_come_from_the_teacher():
    """Whatever the student thinks of the diagonal: the consistency target does not follow it."""
    objective = DECM(teacher=Frozen(), n2n_every=1)
    objective.teacher.attach(watched := Tapped(Toy((2,), ("u",), seed=5), 12))
    seen = watch(objective)
    assert [call.with_gradient for call in seen.calls] == [True, True, True]
    assert len(watched.calls) == 3
    for call in watched.calls:
        assert torch.equal(call.t, call.r)


def test_ema_teacher_without_distillation_serves_the_velocities_of_the_noisy_end():
    objective = DECM(teacher=EmaTeacher(), n2n_every=1)
    objective.teacher.attach(watched := Tapped(Toy((2,), ("u",), seed=5), 12))
    seen = watch(objective)
    x_n, t_n, r_n = clusters_of(seen)[2]
    first, second = watched.calls
    assert torch.equal(first.x, x_n)
    assert torch.equal(first.t, t_n)
    assert torch.equal(second.t, r_n)


def test_every_time_is_the_law_s_later_one():
    class Law(Stratified):
        def __call__(self, n, rng):
            return torch.full((n,), 0.8), torch.full((n,), 0.3)

    objective = DECM(times=Law(), n2n_every=1)
    (_, diagonal, _), (_, near, _), (_, t_n, r_n) = clusters_of(watch(objective))
    assert (near == 0.8).all()
    assert (diagonal == 0.8).all()
    torch.testing.assert_close(r_n, 0.8 * t_n)


class Guided(torch.nn.Module):
    """The mixture's velocities under classifier-free guidance, as u on the diagonal."""

    shape = MIXTURE.shape

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, t, r, cond=None):
        null = MIXTURE.velocity(x, t)
        given = MIXTURE.velocity(x, t, cond) if cond else null
        return {"u": null + self.scale * (given - null)}


@pytest.mark.parametrize("scale", [1.5, 2.5])
def test_guidance_scale_from_scratch(scale, monkeypatch):
    """Of the flow-matching cluster, whose fixed point the other two carry on."""
    only_instant = {"n2n_every": 0, "clip": 0.0}  # a clip of 0 stops the consistency cluster
    objective = DECM(guidance_scale=scale, **only_instant)
    subject = Subject("decm", lambda: objective)

    def bias(scale):
        monkeypatch.setattr(Subject, "exact_field", lambda self, law: Guided(scale))
        return fixed_point.measure(subject, MIXTURE)

    assert bias(scale).z < 4
    assert bias(0.7 * scale).z > 4
    assert bias(1.3 * scale).z > 4


@pytest.mark.parametrize("scale", [1.0, 1.75])
def test_guidance_scale_when_distilled(scale):
    """The teacher is unguided, so the guided network is its fixed point, row by row."""
    objective = DECM(teacher=Frozen(), guidance_scale=scale, n2n_every=0, cosine_weight=1.0)
    objective.teacher.attach(Guided(1.0))
    batch = law_batch(MIXTURE, 64, 0)

    def largest(network):
        out = objective.loss(network, batch, torch.Generator().manual_seed(0))
        return float(out.terms["v"].max())

    assert largest(Guided(scale)) < 1e-20
    assert largest(Guided(1.1 * scale)) > 1e-4


def test_limited_guidance_moves_by_the_limit_at_most():
    objective = DECM(teacher=Frozen(), guidance_scale=3.0, guidance_limit=0.1, label_dropout=0.0)
    objective.teacher.attach(Guided(1.0))
    batch = law_batch(MIXTURE, 64, 0)
    out = objective.loss(Guided(1.0), batch, torch.Generator().manual_seed(0))
    moved = out.terms["v"].sqrt()
    assert moved.max() <= 0.2 + 1e-9  # (3 - 1) * 0.1
    assert moved.max() > 0.19


@pytest.mark.parametrize("teacher", [None, Frozen()])
def test_guidance_needs_labels(teacher):
    objective = DECM(guidance_scale=2.0)
    if teacher:
        teacher.attach(Toy((2,), ("u",)))
        objective = replace(objective, teacher=teacher)
    with pytest.raises(ValueError, match="labels"):
        watch(objective, labels="none")


@pytest.mark.slow
def test_cosine_with_a_conditional_velocity_moves_the_optimum():
    """Hence 0 without a teacher; with one its target is exact and nothing moves."""
    fields = {"cosine_weight": 50.0, "n2n_every": 0, "clip": 0.0}
    scratch = Subject("decm", lambda: DECM(**fields))
    assert fixed_point.measure(scratch, MIXTURE).z > 4
    distilled = Subject("decm", lambda: DECM(**fields, teacher=Frozen()))
    assert fixed_point.measure(distilled, GAUSSIAN).z < 4


def test_first_step_of_training_has_a_finite_gradient_with_the_cosine():
    """A network starts at zero, where a cosine has no direction."""
    objective = DECM(teacher=Frozen(), cosine_weight=1.0)
    objective.teacher.attach(Toy((2,), ("u",), seed=5))
    net = Toy((2,), ("u",), scale=0.0)
    out = objective.loss(net, random_batch(n=32), torch.Generator().manual_seed(0))
    out.per_sample.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_defaults_are_those_of_the_reading():
    objective = DECM()
    assert (objective.lam, objective.gamma) == (0.5, 1.0)
    assert (objective.n2n_every, objective.clip) == (3, 1.0)
    assert (objective.start_gap, objective.start_decay_steps) == (0.1, 20_000)
    assert objective.times == Stratified()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n2n_every", -1),
        ("lam", -0.5),
        ("gamma", -1.0),
        ("start_gap", -0.1),
        ("guidance_scale", 0.5),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"^decm\.{field} = "):
        DECM(**{field: value})
