"""Derivative backends on every backbone: agreement, checkpointing, autocast, dropout."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from backbone_cases import awake, small
from derivative_cases import ROUNDING, Kernels, along, error, output
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import registry
from backbones.heads import AverageVelocity, Velocity
from registry.protocols import Derivative
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import OnePass
from zoo.ops import like
from zoo.teachers import without_gradient

each_backbone = pytest.mark.parametrize("backbone", registry.backbones.names())
each_backend = pytest.mark.parametrize("backend", registry.derivatives.names())
each_exact = pytest.mark.parametrize("backend", ["dual", "jvp"])  # in a pass of their own

DIFFERENCES = 2e-3  # relative, in float32; measured at the default step 1e-3: up to 6e-4

HEAD_SETS = {
    "v": (("v",), None),
    "u": (("u",), None),
    "dual": (("u", "v"), None),
    "two": (("u", "v"), (AverageVelocity, Velocity)),
    "logvar": (("u", "v", "logvar"), None),
}


def central(fn, primals, tangents, step=1e-5) -> Tensor:
    """In float64; errors of (16 step)^2 / 6 = 4e-9 by truncation and 1e-16 / step by rounding."""
    primals, tangents = ([v.double() for v in vs] for vs in (primals, tangents))
    with torch.no_grad():
        ahead, behind = (
            fn(*(p + s * d for p, d in zip(primals, tangents, strict=True))) for s in (step, -step)
        )
    return (ahead - behind) / (2 * step)


# closed form


def test_four_backends_are_registered():
    assert registry.derivatives.names() == ("dual", "finite_difference", "jvp", "one_pass")
    for name in registry.derivatives.names():
        assert isinstance(registry.derivatives.build(name), Derivative)
    assert not FiniteDifference.needs_forward_ad
    assert Dual.needs_forward_ad
    assert Jvp.needs_forward_ad


@each_backend
@settings(max_examples=10)
@given(a=st.floats(-2, 2), b=st.floats(-2, 2), c=st.floats(-2, 2))
def test_derivative_matches_the_closed_form_along_any_direction(backend, a, b, c):
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    t, r = torch.tensor([[0.9, 0.5, 0.2], [0.0, 0.4, 0.1]], dtype=torch.float64)
    tangents = (a * torch.cos(x), torch.full_like(t, b), torch.full_like(r, c))
    found = registry.derivatives.build(backend)(
        lambda x, t, r: torch.sin(2 * x) * like(t**2, x) + like(torch.exp(r), x),
        (x, t, r),
        tangents,
    )
    expected = 2 * torch.cos(2 * x) * like(t**2, x) * tangents[0] + torch.sin(2 * x) * like(
        2 * t * b, x
    )
    # Central differences: step^2 / 6 times a third derivative of at most 200.
    tolerance = 1e-4 if backend == "finite_difference" else 1e-12
    torch.testing.assert_close(found, expected + like(torch.exp(r) * c, x), atol=tolerance, rtol=0)


@each_backend
def test_derivative_needs_a_tangent_for_every_input(backend):
    x, t = torch.randn(4, 2), torch.rand(4)
    with pytest.raises((ValueError, RuntimeError)):
        registry.derivatives.build(backend)(lambda x, t: x * t[:, None], (x, t), (x,))


def test_finite_difference_is_second_order():
    primals, tangents, cond = along("mlp")
    f = output(awake(small("mlp")).double(), cond)
    primals, tangents = ([v.double() for v in vs] for vs in (primals, tangents))
    exact = Dual()(f, primals, tangents)
    coarse, fine = (
        error(FiniteDifference(step=step)(f, primals, tangents), exact) for step in (2e-3, 1e-3)
    )
    assert coarse / fine == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("step", [0.0, -1e-3, 1.0, float("nan")])
def test_finite_difference_refuses_a_step_outside_its_interval(step):
    with pytest.raises(ValueError, match=r"finite_difference.step = .* must lie in \(0, 1\)"):
        FiniteDifference(step=step)


# every backbone


# The set with logvar has every output; the others are read by the same lines on every backbone.
@pytest.mark.parametrize(
    ("backbone", "heads"),
    [
        pytest.param(
            *(backbone, heads),
            marks=() if heads == "logvar" or backbone in ("mlp", "dit") else pytest.mark.slow,
        )
        for heads in HEAD_SETS
        for backbone in registry.backbones.names()
    ],
)
def test_backends_agree_on_every_output(backbone, heads):
    keys, chosen = HEAD_SETS[heads]
    net = awake(small(backbone, keys, heads=chosen))
    single = {}
    for which in ("mean_flow", "n2n"):
        primals, tangents, cond = along(backbone, which=which)
        for key in net.keys:
            f = output(net, cond, key)
            single[which, key] = [
                registry.derivatives.build(name)(f, primals, tangents)
                for name in ("dual", "jvp", "one_pass", "finite_difference")
            ]
    net.double()
    for (which, key), (dual, jvp, one_pass, difference) in single.items():
        primals, tangents, cond = along(backbone, which=which)
        expected = central(output(net, cond, key), primals, tangents)
        assert dual.dtype == jvp.dtype == difference.dtype == torch.float32
        assert one_pass.dtype == torch.float32
        assert error(dual, jvp.double()) < ROUNDING
        assert error(one_pass, expected) < ROUNDING
        assert error(dual, expected) < ROUNDING
        assert error(jvp, expected) < ROUNDING
        assert error(difference, expected) < DIFFERENCES


@each_backbone
@each_backend
def test_result_carries_no_graph_and_leaves_no_gradient(backbone, backend):
    net = awake(small(backbone))
    primals, tangents, cond = along(backbone)
    for value in (*primals, *tangents):
        value.requires_grad_()
    derivative = registry.derivatives.build(backend)
    for f in (output(net, cond), lambda x, t, r: x):
        found = derivative(f, primals, tangents)
        assert not found.requires_grad
        assert found.grad_fn is None
        assert not forward_ad.unpack_dual(found).tangent
    assert all(p.grad is None for p in (*net.parameters(), *primals, *tangents))
    assert torch.is_grad_enabled()


# activation checkpointing


class AlwaysCheckpointed(nn.Module):
    """Recomputes its body whether or not a gradient is wanted, as networks of others may."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, t, r, cond=None):
        return {"u": checkpoint(output(self.net, cond), x, t, r, use_reentrant=False)}


@each_backend
@pytest.mark.parametrize("always", [False, True])
def test_checkpointed_network_has_the_derivative_and_gradient_of_the_plain_one(backend, always):
    plain = awake(small("dit"))
    saving = awake(small("dit", checkpointing=not always))
    saving = AlwaysCheckpointed(saving) if always else saving
    primals, tangents, cond = along("dit")
    derivative = registry.derivatives.build(backend)
    found, expected = (derivative(output(n, cond), primals, tangents) for n in (saving, plain))
    assert found.equal(expected)
    for net in (saving, plain):  # as in a loss: the target comes first
        (output(net, cond)(*primals) - expected).square().mean().backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert ours.grad.abs().sum() > 0
        torch.testing.assert_close(ours.grad, theirs.grad)


# bfloat16


@each_backbone
def test_exact_backends_stay_close_under_autocast_and_differences_leave_it(backbone):
    primals, tangents, cond = along(backbone)
    f = output(awake(small(backbone)), cond)
    expected, differences = (d(f, primals, tangents) for d in (Dual(), FiniteDifference()))

    def naive(step):
        with torch.no_grad():
            ahead, behind = (
                f(*(p + s * d for p, d in zip(primals, tangents, strict=True)))
                for s in (step, -step)
            )
        return (ahead - behind) / (2 * step)

    with torch.autocast("cpu", torch.bfloat16):
        for derivative in (Dual(), Jvp(), OnePass()):
            found = derivative(f, primals, tangents)
            assert found.dtype == torch.float32
            # 8 bits, 0.4 % a rounding and a few roundings deep; measured 1-4 %.
            assert 1e-4 < error(found, expected.double()) < 0.06
        assert FiniteDifference()(f, primals, tangents).equal(differences)
        assert error(naive(1e-3), expected.double()) > 0.3
        assert torch.is_autocast_enabled("cpu")


@each_backend
@pytest.mark.parametrize("teacher", [False, True])
def test_autocast_cache_keeps_no_weight_without_gradient(backend, teacher):
    primals, tangents, cond = along("mlp")
    net = awake(small("mlp"))
    f = output(net, cond)

    def gradients(before):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # its cache enabled
            before()
            f(*primals).square().mean().backward()
        return [p.grad for p in net.parameters()]

    def pass_without_gradient():
        if teacher:
            without_gradient(net)(*primals, cond)
        else:
            registry.derivatives.build(backend)(f, primals, tangents)

    expected = gradients(lambda: None)
    assert all(g.abs().sum() > 0 for g in expected)
    for ours, theirs in zip(gradients(pass_without_gradient), expected, strict=True):
        assert ours.equal(theirs)


@each_backend
@pytest.mark.parametrize("fails", [False, True])
def test_autocast_cache_is_empty_after_a_pass_and_after_an_error(backend, fails):
    # A stale weight shows what the cache holds. Some releases of torch cache without gradient too.
    linear, x = nn.Linear(3, 3, bias=False), torch.ones(2, 3)
    derivative = registry.derivatives.build(backend)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with torch.enable_grad():
            before = linear(x)
        linear.weight *= 2
        with torch.enable_grad():
            assert linear(x).equal(before)
        with pytest.raises(ZeroDivisionError) if fails else nullcontext():
            derivative(lambda x: linear(x) / (1 // (not fails)), (x,), (x,))
        with torch.enable_grad():
            assert linear(x).equal(2 * before)


# dropout


@each_backend
@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_dropout_is_the_same_in_both_evaluations_and_in_the_next_forward(backbone, backend):
    primals, tangents, cond = along(backbone)
    net = awake(small(backbone, dropout=0.3)).train()
    f = output(net, cond)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    found = registry.derivatives.build(backend)(f, primals, tangents)
    assert torch.get_rng_state().equal(before)

    net.double()  # masks of one seed are the same in every precision on a CPU

    def seeded(*args):
        torch.manual_seed(4)
        return f(*args)

    expected = central(seeded, primals, tangents)
    assert error(found, expected) < DIFFERENCES
    torch.manual_seed(5)  # other masks: another derivative
    assert (
        error(Dual()(f, *([v.double() for v in vs] for vs in (primals, tangents))), expected) > 0.1
    )


@each_backend
def test_the_forward_after_a_derivative_draws_the_masks_of_the_pass(backend):
    masks = []

    def f(x, t, r):
        masks.append(F.dropout(torch.ones(4, 3), 0.5))
        return x * masks[-1]

    x, t = torch.ones(4, 3), torch.zeros(4)
    torch.manual_seed(6)
    found = registry.derivatives.build(backend)(f, (x, t, t), (x, t, t))
    following = f(x, t, t)
    assert 0 < (following == 0).sum() < 12
    torch.testing.assert_close(found, following, atol=1e-4, rtol=1e-4)
    assert not f(x, t, t).equal(following)


@each_backend
def test_the_generator_is_restored_after_an_error_too(backend):
    def fails(x):
        return torch.rand(3) / (1 // 0)

    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        registry.derivatives.build(backend)(fails, (torch.ones(2),), (torch.ones(2),))
    assert torch.get_rng_state().equal(before)


# networks that cut the derivative


class Cut(nn.Module):
    """A network behind a stray operation on one of its inputs."""

    def __init__(self, net: nn.Module, how: str):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x, t, r, cond=None):
        if self.how == "detach":
            t = t.detach()
        elif self.how == "item":
            t = torch.stack([torch.tensor(s.item(), dtype=t.dtype) for s in t])
        return self.net(x, t, r, cond)


@each_backbone
@pytest.mark.parametrize("how", ["detach", "item"])
def test_a_cut_is_wrong_in_both_exact_backends_alike_and_not_in_differences(backbone, how):
    primals, tangents, cond = along(backbone)
    net = awake(small(backbone))
    expected = Dual()(output(net, cond), primals, tangents).double()
    f = output(Cut(net, how), cond)
    assert f(*primals).equal(output(net, cond)(*primals))  # nothing shows in the output
    dual, jvp, differences = (d(f, primals, tangents) for d in (Dual(), Jvp(), FiniteDifference()))
    assert error(dual, jvp.double()) < ROUNDING
    assert error(dual, expected) > 0.1
    assert error(differences, expected) < DIFFERENCES


def test_dual_says_so_when_nothing_of_the_derivative_is_left():
    primals, tangents, _ = along("mlp")
    with pytest.raises(RuntimeError, match=r"carries no tangent of \(x, t, r\): .*\.detach\(\)"):
        Dual()(lambda x, t, r: x.detach(), primals, tangents)


# cost


@each_backbone
def test_dual_costs_a_pass_for_the_value_and_one_for_the_tangent(backbone):
    net, (primals, tangents, cond) = awake(small(backbone)), along(backbone)
    with torch.no_grad(), FlopCounterMode(display=False) as once:
        net(*primals, cond)
    with FlopCounterMode(display=False) as counted:
        Dual()(output(net, cond), primals, tangents)
    # Attention scores, a product of two tangents' worth, are the rest; torch's own rule takes 3.
    assert 1.9 < counted.get_total_flops() / once.get_total_flops() < 2.1


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_dual_differentiates_a_layer_by_its_weights_too(moving):
    given = [torch.randn(shape, dtype=torch.float64) for shape in ((5, 3), (4, 3), (4,))]
    tangents = [
        torch.randn_like(part) if i in moving else torch.zeros_like(part)
        for i, part in enumerate(given)
    ]
    (x, w, _), (dx, dw, db) = given, tangents

    def layer(*moved: Tensor) -> Tensor:
        parts = dict(enumerate(given)) | dict(zip(moving, moved, strict=True))
        return F.linear(*parts.values())

    found = Dual()(layer, [given[i] for i in moving], [tangents[i] for i in moving])
    assert torch.allclose(found, dx @ w.T + x @ dw.T + db)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 4, 5)])
def test_dual_differentiates_group_norm(shape, affine):
    """To float64 rounding of torch's own rule, in any layout of memory."""
    x, dx = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    norm = nn.GroupNorm(4, 8, eps=1e-3, affine=affine).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    value, tangent = torch.func.jvp(norm, (x,), (dx,))
    seen = []
    found = Dual()(lambda x: seen.append(norm(x)) or seen[0], (x,), (dx,))
    torch.testing.assert_close(found, tangent.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0].detach(), value.detach(), rtol=1e-12, atol=1e-12)


def test_dual_differentiates_group_norm_by_its_weights_too():
    given = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 8, 5), (8,), (8,))]
    tangents = [torch.randn_like(part) for part in given]

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, 4, weight, bias)

    expected = torch.func.jvp(norm, tuple(given), tuple(tangents))[1]
    torch.testing.assert_close(Dual()(norm, given, tangents), expected)


def test_dual_takes_a_group_norm_in_one_kernel():
    """torch's own rule takes a dozen; a change of torch that no longer meets ours shows here."""
    norm, x = nn.GroupNorm(4, 8), torch.randn(3, 8, 5)
    with Kernels() as kernels:
        Dual()(norm, (x,), (torch.randn_like(x),))
    assert kernels.calls("native_group_norm_backward") == 1
