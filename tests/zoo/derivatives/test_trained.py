"""Derivatives with their graph: the value, and the gradient against differences of the loss."""

from __future__ import annotations

import pytest
import torch
from backbone_cases import awake, small
from derivative_cases import ROUNDING, along, error, output
from torch import Tensor, nn
from torch.nn import functional as F

import registry
from registry.protocols import DifferentiableDerivative
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp
from zoo.derivatives.one_pass import OnePass
from zoo.derivatives.trained import by_differences, by_gradient, trained_weights
from zoo.ops import like

each_backbone = pytest.mark.parametrize("backbone", registry.backbones.names())
TRAINABLE = ("dual", "finite_difference", "jvp")
each_way = pytest.mark.parametrize("name", TRAINABLE)

# Against differences in float64, of steps 1e-4 of weights and inputs; measured up to 4e-5, which
# falls with the square of the step. A derivative by differences of step 1e-3 is right to 6e-4.
TOLERANCE = {"dual": 1e-4, "jvp": 1e-4, "finite_difference": 2e-3}
STEP, MOVES = 1e-4, 3


def named(net, cond=None):
    return lambda x, t, r: dict(net(x, t, r, cond))


def double(values):
    return tuple(v.double() for v in values)


def moves(net):
    def of(number):
        rng = torch.Generator().manual_seed(number)
        for p in trained_weights(net):
            yield torch.randn(p.shape, generator=rng, dtype=p.dtype)

    return of


def loss(u, du, t, r) -> Tensor:
    """As of a Lagrangian self-distillation, with a constant in place of its target."""
    return (u - like(t - r, u) * du - 0.3).square().mean()


def gradients(name, backbone, *, detached=False, **fields):
    """The loss's gradient along directions of the weights, and differences of the loss."""
    net = awake(small(backbone, **fields)).double()
    primals, tangents, cond = along(backbone)
    primals, tangents = double(primals), double(tangents)
    out, du = registry.derivatives.build(name).with_graph(named(net, cond), primals, tangents, "u")
    du = du.detach() if detached else du
    found = by_gradient(loss(out["u"], du, *primals[1:])[None], net, moves(net), MOVES)

    def number() -> Tensor:
        u = output(net, cond)(*primals)
        du = FiniteDifference(step=STEP)(output(net, cond), primals, tangents)
        return loss(u, du, *primals[1:])[None]

    return found, by_differences(number, net, moves(net), MOVES, STEP)


def test_which_derivatives_can_be_trained():
    for name in registry.derivatives.names():
        derivative = registry.derivatives.build(name)
        assert derivative.differentiable == (name in TRAINABLE)
        assert isinstance(derivative, DifferentiableDerivative)
    with pytest.raises(NotImplementedError, match=r"one_pass .* bind @dual\(\)"):
        OnePass().with_graph(lambda x: {"u": x}, (torch.ones(2),), (torch.ones(2),), "u")
    with pytest.raises(NotImplementedError, match=r"bind dual.attention = 'math'"):
        Dual(attention="jvp_flash").with_graph(
            lambda x: {"u": x}, (torch.ones(2),), (torch.ones(2),), "u"
        )


@each_way
@each_backbone
def test_gradient_is_that_of_differences_of_the_loss(name, backbone):
    found, expected = gradients(name, backbone)
    assert error(found, expected) < TOLERANCE[name]
    detached, _ = gradients(name, backbone, detached=True)
    assert error(detached, expected) > 0.05


@each_way
@each_backbone
def test_outputs_and_derivative_have_the_values_of_separate_passes(name, backbone):
    net = awake(small(backbone, ("u", "v")))
    primals, tangents, cond = along(backbone)
    derivative = registry.derivatives.build(name)
    out, du = derivative.with_graph(named(net, cond), primals, tangents, "u")
    plain = net(*primals, cond)
    assert out.keys() == plain.keys()
    for key, value in plain.items():
        assert error(out[key].detach(), value.detach().double()) < ROUNDING
        assert out[key].requires_grad
    apart = derivative(output(net, cond), primals, tangents)
    tolerance = 1e-2 if name == "finite_difference" else ROUNDING
    assert error(du.detach(), apart.double()) < tolerance
    assert du.requires_grad


@each_way
def test_gradient_reaches_primals_and_tangents_that_have_one(name):
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2).requires_grad_()
    v = torch.cos(x.detach()).requires_grad_()
    out, found = registry.derivatives.build(name).with_graph(
        lambda x: {"u": torch.sin(2 * x)}, (x,), (v,), "u"
    )
    by_x, by_v = torch.autograd.grad(found.sum(), (x, v), retain_graph=True)
    tolerance = {"atol": 1e-5, "rtol": 0} if name == "finite_difference" else {}
    torch.testing.assert_close(by_x, -4 * torch.sin(2 * x) * v, **tolerance)
    torch.testing.assert_close(by_v, 2 * torch.cos(2 * x), **tolerance)
    (by_value,) = torch.autograd.grad(out["u"].sum(), x)
    torch.testing.assert_close(by_value, 2 * torch.cos(2 * x))


class Normed(nn.Module):
    """A layer, a norm, a layer."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(3, 8), norm, nn.Linear(8, 3)

    def forward(self, x):
        return {"u": self.outer(torch.tanh(self.norm(self.inner(x))))}


NORMS = {
    "layer": lambda: nn.LayerNorm(8),
    "layer without weights": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "group": lambda: nn.GroupNorm(2, 8),
    "rms": lambda: nn.RMSNorm(8),
    "batch, evaluated": lambda: nn.BatchNorm1d(8).eval(),
}


@each_way
@pytest.mark.parametrize("kind", NORMS)
def test_gradient_passes_norms(name, kind):
    torch.manual_seed(0)
    net = Normed(NORMS[kind]()).double()
    x, v = torch.randn(2, 5, 3, dtype=torch.float64)
    _, du = registry.derivatives.build(name).with_graph(lambda x: net(x), (x,), (v,), "u")
    found = by_gradient(du.square().sum()[None], net, moves(net), MOVES)

    def number():
        taken = FiniteDifference(step=STEP)(lambda x: net(x)["u"], (x,), (v,))
        return taken.square().sum()[None]

    expected = by_differences(number, net, moves(net), MOVES, STEP)
    assert error(found, expected) < TOLERANCE[name]


@each_way
@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_value_and_derivative_have_the_masks_of_one_forward(name, backbone):
    net = awake(small(backbone, dropout=0.3)).double().train()
    primals, tangents, cond = along(backbone)
    primals, tangents = double(primals), double(tangents)

    def seeded(*at):
        torch.manual_seed(4)
        return net(*at, cond)["u"]

    expected, value = FiniteDifference()(seeded, primals, tangents), seeded(*primals)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    out, du = registry.derivatives.build(name).with_graph(named(net, cond), primals, tangents, "u")
    assert torch.get_rng_state().equal(after)
    torch.testing.assert_close(out["u"], value)
    assert error(du.detach(), expected) < 2e-3
    torch.manual_seed(5)
    _, other = registry.derivatives.build(name).with_graph(named(net, cond), primals, tangents, "u")
    assert error(other.detach(), expected) > 0.1


@pytest.mark.parametrize("derivative", [Dual(), Jvp()], ids=["dual", "jvp"])
def test_bfloat16_stays_close(derivative):
    net = awake(small("dit"))
    primals, tangents, cond = along("dit")

    def gradient():
        out, du = derivative.with_graph(named(net, cond), primals, tangents, "u")
        return by_gradient(loss(out["u"], du, *primals[1:])[None], net, moves(net), MOVES)

    expected = gradient()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert 1e-4 < error(gradient(), expected) < 0.1


@pytest.mark.parametrize("derivative", [Dual(), Jvp()], ids=["dual", "jvp"])
def test_a_norm_over_the_batch_is_refused_in_training_and_not_for_differences(derivative):
    """torch's tangent of it reads statistics that carry no gradient, and its own is wrong."""
    net, (x, v) = Normed(nn.BatchNorm1d(8, track_running_stats=False)), torch.randn(2, 5, 3)
    with pytest.raises(NotImplementedError, match="a norm over the batch .*@finite_difference()"):
        derivative.with_graph(lambda x: net(x), (x,), (v,), "u")
    _, du = FiniteDifference().with_graph(lambda x: net(x), (x,), (v,), "u")
    assert du.requires_grad


def test_attention_is_torchs():
    """With every kind of mask; scores that are masked everywhere in a row are not asked for."""
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    some = torch.rand(6, 6) < 0.7
    some[:, 0] = True
    masks = [
        {},
        {"is_causal": True},
        {"attn_mask": some},
        {"attn_mask": torch.randn(6, 6).double()},
    ]
    for given in [*masks, {"scale": 0.3}]:
        expected = F.scaled_dot_product_attention(q, k, v, **given)
        out, du = Dual().with_graph(
            lambda q, given=given: {"u": F.scaled_dot_product_attention(q, k, v, **given)},
            (q,), (v,), "u",
        )  # fmt: skip
        torch.testing.assert_close(out["u"], expected)
        plain = Dual()(
            lambda q, given=given: F.scaled_dot_product_attention(q, k, v, **given), (q,), (v,)
        )
        torch.testing.assert_close(du, plain)
    with pytest.raises(NotImplementedError, match="enable_gqa"):
        Dual().with_graph(
            lambda q: {"u": F.scaled_dot_product_attention(q, k, v, enable_gqa=True)},
            (q,), (v,), "u",
        )  # fmt: skip


def test_dual_says_so_when_nothing_of_the_derivative_is_left():
    primals, tangents, _ = along("mlp")
    with pytest.raises(RuntimeError, match="carries no tangent"):
        Dual().with_graph(lambda x, t, r: {"u": x.detach()}, primals, tangents, "u")
