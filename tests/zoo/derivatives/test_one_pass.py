"""Value and derivative from one forward: both right, the value as ever, nothing lost unnoticed."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import awake, inputs, small
from derivative_cases import ROUNDING, Kernels, both, each_way, error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.grids.axes  # noqa: F401  registers Grid
import registry
from benchmarks.experiments.build import run
from registry import gin_setup
from registry.protocols import Batch, parts
from zoo.derivatives.methods import Dual, FiniteDifference, Jvp, with_derivatives
from zoo.derivatives.one_pass import OnePass, apart, outputs_and_derivative, outputs_then_derivative
from zoo.objectives.decm import DECM
from zoo.objectives.dumo import DuMo
from zoo.objectives.flow_matching import FlowMatching
from zoo.objectives.mean_flow import MeanFlow
from zoo.residuals import Exact
from zoo.teachers import Online
from zoo.times import LogitNormalPair

each_backbone = pytest.mark.parametrize("backbone", registry.backbones.names())

# Relative errors of a derivative against `dual`, measured: 7e-7 in float32.


def case(backbone, **fields):
    """A network, a point and tangents with no zero among them."""
    net = awake(small(backbone, ("u", "v", "logvar"), **fields))
    x, t, r, cond = inputs(backbone)
    tangents = (torch.randn_like(x), torch.ones_like(t), torch.full_like(r, -0.5))
    return net, cond, (x, t, r), tangents


def gradients(net, outputs):
    loss = sum(value.double().square().sum() for value in outputs.values())
    return torch.autograd.grad(loss, list(net.parameters()))


# networks


@each_way
@each_backbone
def test_outputs_and_gradients_are_those_of_a_plain_forward_to_the_bit(backbone, way):
    net, cond, point, tangents = case(backbone)
    out, du = both(way, lambda *at: net(*at, cond), point, tangents)
    plain = net(*point, cond)
    assert out.keys() == plain.keys()
    for name, value in out.items():
        assert type(value) is Tensor
        assert value.equal(plain[name])
    for ours, theirs in zip(gradients(net, out), gradients(net, plain), strict=True):
        assert ours.equal(theirs)
    assert type(du) is Tensor
    assert du.grad_fn is None
    assert not du.requires_grad


@each_way
@each_backbone
@pytest.mark.parametrize("key", ["u", "v"])
def test_derivative_is_that_of_dual_numbers(backbone, key, way):
    net, cond, point, tangents = case(backbone)
    _, found = both(way, lambda *at: net(*at, cond), point, tangents, key)
    expected = Dual()(lambda *at: net(*at, cond)[key], point, tangents)
    assert error(found, expected) < ROUNDING
    other = (tangents[0], tangents[1], -tangents[2])
    _, wrong = both(way, lambda *at: net(*at, cond), point, other, key)
    assert error(wrong, expected) > 1e-2


@each_way
@pytest.mark.parametrize("backbone", ["dit", "unet", "ddpmpp", "lightning_dit"])
def test_checkpointed_blocks_have_the_same_value_gradient_and_derivative(backbone, way):
    plain, cond, point, tangents = case(backbone)
    saving = awake(small(backbone, ("u", "v", "logvar"), checkpointing=True))
    out, du = both(way, lambda *at: saving(*at, cond), point, tangents)
    expected, du_plain = both(way, lambda *at: plain(*at, cond), point, tangents)
    assert du.equal(du_plain)
    for ours, theirs in zip(gradients(saving, out), gradients(plain, expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@each_way
def test_blocks_that_are_computed_again_do_without_tangents(way):
    net, cond, point, tangents = case("dit", checkpointing=True)
    plain = case("dit")[0]

    def flops_of_backward(net):
        out, _ = both(way, lambda *at: net(*at, cond), point, tangents)
        with FlopCounterMode(display=False) as counter:
            gradients(net, out)
        return counter.get_total_flops()

    def flops_of_forward():
        with FlopCounterMode(display=False) as counter:
            plain(*point, cond)
        return counter.get_total_flops()

    again = flops_of_backward(net) - flops_of_backward(plain)
    assert 0 < again <= flops_of_forward()


@each_way
@each_backbone
def test_autocast_rounds_the_value_as_ever_and_the_derivative_alike(backbone, way):
    net, cond, point, tangents = case(backbone)
    exact = Dual()(lambda *at: net(*at, cond)["u"], point, tangents)

    def under(forward):
        with torch.autocast("cpu", torch.bfloat16):
            out, du = forward()
        return out, du, gradients(net, out)

    out, du, ours = under(lambda: both(way, lambda *at: net(*at, cond), point, tangents))
    plain, _, theirs = under(lambda: (net(*point, cond), None))
    assert all(out[name].equal(plain[name]) for name in plain)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    assert du.dtype == torch.float32
    # 8 bits, 0.4 % a rounding and a few roundings deep, as for `dual`; measured 1-4 %.
    assert 1e-4 < error(du, exact) < 0.06


@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_value_and_derivative_share_their_dropout_masks(backbone):
    net, cond, point, tangents = case(backbone, dropout=0.3)
    net.double().train()
    point, tangents = ([v.double() for v in vs] for vs in (point, tangents))

    def seeded(*at):
        torch.manual_seed(4)
        return net(*at, cond)

    out, found = both("with_value", seeded, point, tangents)
    assert out["u"].equal(seeded(*point)["u"])
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (
            seeded(*(p + s * d for p, d in zip(point, tangents, strict=True)))["u"]
            for s in (step, -step)
        )
    assert error(found, (ahead - behind) / (2 * step)) < 1e-6


def bits(fn, *values):
    """fn by one_pass, its gradient and its derivative, and value and gradient by itself."""
    weight = torch.ones_like(values[0]).requires_grad_()

    def seeded(*at):
        torch.manual_seed(4)
        return fn(weight * at[0], *at[1:])

    out, du = both("with_value", lambda *at: {"u": seeded(*at)}, values, values)
    plain = seeded(*values)
    ours, theirs = (torch.autograd.grad(v.float().sum(), weight)[0] for v in (out["u"], plain))
    return (out["u"], ours), (plain, theirs), du


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.15, 0.3, 1.0])
def test_dropout_is_that_of_an_ordinary_pass_to_the_bit(p, dtype):
    ours, plain, du = bits(lambda x: F.dropout(x, p), torch.randn(64, 64, dtype=dtype))
    assert all(a.equal(b) for a, b in zip(ours, plain, strict=True))
    assert du.equal(ours[0])  # it is linear


def test_channels_last_stay_last_through_group_norm():
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    ours, plain, _ = bits(lambda x: F.group_norm(x, 4, torch.linspace(0.5, 2, 8)), x)
    assert all(a.equal(b) for a, b in zip(ours, plain, strict=True))
    assert ours[0].stride() == plain[0].stride()


def test_small_values_in_bfloat16_move_through_rms_norm():
    x, along = 1e-2 * torch.randn(2, 64, 8)
    _, exact = OnePass().with_value(lambda x: {"u": F.rms_norm(x, (8,))}, (x,), (along,), "u")
    low = (x.bfloat16(),), (along.bfloat16(),)
    _, found = OnePass().with_value(lambda x: {"u": F.rms_norm(x, (8,))}, *low, "u")
    assert error(found, exact) < 0.03  # bits of bfloat16


@each_way
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_running_statistics_follow_the_values_once(kind, way):
    x, along = torch.randn(2, 4, 3, 5, 5)
    norm, plain = (kind(3, affine=True, track_running_stats=True) for _ in range(2))
    out, found = both(way, lambda x: {"u": norm(x)}, (x,), (along,))
    assert out["u"].equal(plain(x))
    for ours, theirs in zip(norm.buffers(), plain.buffers(), strict=True):
        assert ours.equal(theirs)
    assert error(found, Dual()(plain, (x,), (along,))) < ROUNDING
    plain.eval()
    _, found = both(way, lambda x: {"u": plain(x)}, (x,), (along,))
    assert error(found, Dual()(plain, (x,), (along,))) < ROUNDING


def test_derivative_is_of_the_kind_of_its_value_in_mixed_precision():
    x, weight = torch.randn(2, 8, 6).bfloat16(), torch.ones(8)

    def fn(x):
        return {"u": F.group_norm(x, 4, weight, weight)}

    out, du = OnePass().with_value(fn, (x,), (x,), "u")
    assert du.dtype == out["u"].dtype == torch.bfloat16


def test_the_value_keeps_its_fused_kernel():
    net, cond, point, tangents = case("dit")
    with Kernels() as kernels:
        OnePass().with_value(lambda *at: net(*at, cond), point, tangents, "u")
    assert kernels.calls("scaled_dot_product") == len(net.trunk.blocks)


def test_a_layer_costs_one_product_more():
    """So a forward with its derivative costs two, of which `dual` needs both for itself."""
    net, cond, point, tangents = case("mlp")

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def fn(x, t, r):
        return net(x, t, r, cond)

    once = flops(lambda: fn(*point))
    assert flops(lambda: OnePass().with_value(fn, point, tangents, "u")) == 2 * once
    _, du_along = OnePass().linearized(fn, point, "u")
    assert flops(lambda: du_along(tangents)) < once  # the other heads are not moved


def test_a_linearized_record_lets_go_of_what_it_held():
    held = []

    def fn(x):
        middle = x * 2
        held.append(weakref.ref(middle.primal))
        return {"u": middle * middle}

    x = torch.ones(3)
    _, du_along = OnePass().linearized(fn, (x,), "u")
    gc.collect()
    assert held[0]() is not None
    assert du_along((torch.ones(3),)).equal(torch.full((3,), 8.0))
    gc.collect()
    assert held[0]() is None


def test_a_derivative_is_given_once():
    x = torch.ones(3)
    _, du_along = OnePass().linearized(lambda x: {"u": x * x}, (x,), "u")
    du_along((x,))
    with pytest.raises(RuntimeError, match="once"):
        du_along((x,))


@pytest.mark.parametrize("ends", ["unasked", "asked late", "in an error"])
def test_a_linearized_record_under_checkpointing_lets_go_of_what_it_held(ends):
    held, layer, x = [], nn.Linear(3, 3), torch.ones(2, 3)

    def fn(x):
        inner = layer(x)
        held.append(weakref.ref(inner.primal))
        out = checkpoint(lambda h: h.sin() * h, inner, use_reentrant=False)
        return {} if ends == "in an error" else {"u": out}

    def evaluated():
        if ends == "in an error":
            with pytest.raises(KeyError):
                OnePass().linearized(fn, (x,), "u")
            return
        out, du_along = OnePass().linearized(fn, (x,), "u")
        if ends == "asked late":
            out["u"].sum().backward()  # which computes the block again
            du_along((x,))

    evaluated()
    gc.collect()
    assert held[0]() is None


# objectives


OBJECTIVES = {
    "mean_flow": MeanFlow(),
    "every row": MeanFlow(times=LogitNormalPair(off_diagonal_fraction=1.0)),
    "no row": MeanFlow(times=LogitNormalPair(off_diagonal_fraction=0.0)),
    "dumo": DuMo(residual=Exact(), teacher=Online()),
    "dumo, known direction": DuMo(residual=Exact(), teacher=Online(), direction="guided"),
    "decm": DECM(),
}


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_dual_numbers(name, step):
    net, cond, (x, _, _), _ = case("dit")

    def evaluated(objective):
        batch = Batch(x0=x, cond=cond, step=step)
        out = objective.loss(net, batch, torch.Generator().manual_seed(3))
        (out.per_sample.sum()).backward()
        found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        net.zero_grad()
        return out, found

    ours, gradient = evaluated(OBJECTIVES[name])
    theirs, expected = evaluated(apart(OBJECTIVES[name]))
    assert all(not isinstance(part, OnePass) for _, part in parts(apart(OBJECTIVES[name])))
    torch.testing.assert_close(ours.per_sample, theirs.per_sample, rtol=1e-4, atol=1e-5)
    assert error(gradient, expected) < 1e-4
    assert ours.terms.keys() == theirs.terms.keys()


def test_another_derivative_replaces_it_in_every_part():
    other = FiniteDifference()
    assert with_derivatives(MeanFlow(), lambda _: other) == MeanFlow(derivative=other)
    exact = with_derivatives(DuMo(residual=Exact()), lambda _: other)
    assert exact.residual.derivative == other
    assert with_derivatives(plain := FlowMatching(), lambda _: other) is plain
    kept = DuMo(residual=Exact())
    assert apart(kept).teacher is kept.teacher
    assert apart(kept).residual.derivative == Dual()
    assert apart(objective := MeanFlow(derivative=Jvp())) is objective


@pytest.mark.parametrize(
    ("binding", "said"),
    [("run.compile = True", "run.compile"), ("run.engine = @zero_engine()", "@zero_engine()")],
)
def test_compiled_and_sharded_runs_take_the_derivative_in_a_pass_of_its_own(binding, said, caplog):
    tiny = ["dit.dim = 16", "dit.depth = 1", "dit.num_heads = 2", "run.recorder = @null()"]
    gin_setup.parse(["bench.gin"], [*tiny, binding, "zero_engine.stage = 3"])
    with caplog.at_level(logging.WARNING), gin_setup.arm("mean_flow"):
        assert run().objective.derivative == Dual()
    assert f"{said}" in caplog.text
    assert "@dual() for @one_pass()" in caplog.text


def test_a_derivative_of_ones_own_still_has_its_own_pass():
    net, cond, point, tangents = case("mlp")

    class Mine:
        needs_forward_ad = True

        def __call__(self, fn, primals, tangents):
            return 2 * Dual()(fn, primals, tangents)

    expected = Dual()(lambda *at: net(*at, cond)["u"], point, tangents)
    out, found = outputs_and_derivative(Mine(), net, cond, point, tangents)
    assert found.equal(2 * expected)
    assert out["u"].equal(net(*point, cond)["u"])
    out, du_along = outputs_then_derivative(Mine(), net, cond, point)
    assert du_along(tangents).equal(2 * expected)
    _, du_along = outputs_then_derivative(None, net, cond, point)
    with pytest.raises(TypeError, match="without a derivative"):
        du_along(tangents)


def test_tangents_of_the_first_rows_alone():
    net, cond, point, tangents = case("dit")
    some = tuple(part[:2] for part in tangents)
    first = {name: value[:2] for name, value in cond.items()}
    at_first = tuple(part[:2] for part in point)
    expected = Dual()(lambda *at: net(*at, first)["u"], at_first, some)
    out, found = outputs_and_derivative(OnePass(), net, cond, point, some)
    assert error(found, expected) < ROUNDING
    plain = net(*point, cond)
    for name in plain:  # other numbers of rows round otherwise
        torch.testing.assert_close(out[name], plain[name])
    none = tuple(part[:0] for part in tangents)
    out, found = outputs_and_derivative(OnePass(), net, cond, point, none)
    assert found.shape == (0, *point[0].shape[1:])
    assert out["u"].equal(plain["u"])
