"""Blocks that see the end of the step alone: what they see, and what the network starts as."""

from __future__ import annotations

import pytest
import torch

from backbones import build_network, warm_start
from backbones.dit import DiT
from backbones.mlp import MLP
from registry.protocols import NULL_LABEL
from zoo.derivatives.methods import Dual, FiniteDifference
from zoo.derivatives.one_pass import OnePass, outputs_and_derivative

SIZES = {
    "dit": (DiT, (3, 8, 8), {"patch": 4, "dim": 16, "depth": 3, "num_heads": 2}),
    "mlp": (MLP, (2,), {"dim": 16, "depth": 3}),
}
each = pytest.mark.parametrize("name", SIZES)


def network(name, keys=("u",), **settings):
    cls, shape, size = SIZES[name]
    torch.manual_seed(0)
    net = build_network(lambda **given: cls(**size, **settings, **given), shape, 4, keys)
    for p in net.parameters():  # nothing starts at zero
        torch.nn.init.normal_(p, std=0.3)
    return net


def point(name, n=5):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, *SIZES[name][1], generator=rng)
    t, r = torch.rand(2, n, generator=rng).sort(0, descending=True).values
    return x, t, r, {"label": torch.tensor([0, 1, 2, 3, NULL_LABEL])}


def conditions(net, x, t, r, cond):
    """What each block and the readout are conditioned on."""
    seen, hooks = [], []
    for module in (*net.trunk.blocks, net.heads["average_velocity"].readouts["u"]):
        keep = lambda _, inputs: seen.append(inputs[1])  # noqa: E731
        hooks.append(module.register_forward_pre_hook(keep))
    net(x, t, r, cond)
    for hook in hooks:
        hook.remove()
    return seen


@each
def test_the_first_blocks_see_t_alone_and_the_others_r_alone(name):
    net, (x, t, r, cond) = network(name, decoder_from=1), point(name)
    base = conditions(net, x, t, r, cond)
    at_r, at_t = conditions(net, x, t, r / 2, cond), conditions(net, x, (1 + t) / 2, r, cond)
    assert [a.equal(b) for a, b in zip(base, at_r, strict=True)] == [True, False, False, False]
    assert [a.equal(b) for a, b in zip(base, at_t, strict=True)] == [False, True, True, True]
    both = conditions(network(name), x, t, r / 2, cond)  # the control: every block sees both
    assert not any(
        a.equal(b) for a, b in zip(both, conditions(network(name), x, t, r, cond), strict=True)
    )


@each
def test_it_has_the_weights_of_a_flow_and_is_one_where_r_is_t(name):
    flow, (x, t, r, cond) = network(name, ("v",)), point(name)
    student = network(name, decoder_from=2)
    assert student.trunk.state_dict().keys() == flow.trunk.state_dict().keys()
    warm_start(student, flow)
    v = flow(x, t, t, cond)["v"]
    assert student(x, t, t, cond)["u"].equal(v)
    assert not torch.allclose(student(x, t, r, cond)["u"], v, rtol=1e-2)


@each
def test_a_network_of_one_time_ignores_the_setting(name):
    one, other = network(name, ("v",), decoder_from=1), network(name, ("v",))
    x, t, r, cond = point(name)
    assert one(x, t, r, cond)["v"].equal(other(x, t, t, cond)["v"])


@each
def test_a_map_with_other_blocks_is_no_start(name):
    with pytest.raises(ValueError, match="decoder_from = 2, the teacher's 1"):
        warm_start(network(name, decoder_from=2), network(name, decoder_from=1))


@each
@pytest.mark.parametrize("value", [0, 3, -1])
def test_a_block_that_leaves_one_kind_empty_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}.decoder_from = {value} .* from 1 to 2"):
        network(name, decoder_from=value)


@each
def test_derivatives_agree(name):
    net, (x, t, r, cond) = network(name, decoder_from=2).double(), point(name)
    given = x.double(), t.double(), r.double()
    tangents = torch.ones_like(given[0]), torch.ones_like(given[1]), torch.zeros_like(given[2])
    found = [
        outputs_and_derivative(derivative, net, cond, given, tangents)[1]
        for derivative in (OnePass(), Dual(), FiniteDifference())
    ]
    assert found[0].abs().mean() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
    assert float((found[0] - found[2]).norm() / found[0].norm()) < 0.05  # of a step that is finite


@each
def test_the_log_variance_of_times_knows_both_of_them(name):
    from backbones.heads import AverageVelocity, LogVarianceOfTimes

    cls, shape, size = SIZES[name]
    heads = (AverageVelocity, LogVarianceOfTimes)
    net = build_network(
        lambda **given: cls(**size, decoder_from=1, **given), shape, 4, ("u", "logvar"), heads
    )
    x, t, r, cond = point(name)
    assert net(x, t, r, cond)["logvar"].equal(torch.zeros(5))
    torch.nn.init.normal_(net.heads["log_variance_of_times"].linear.weight)
    base = net(x, t, r, cond)["logvar"]
    assert not net(x, (1 + t) / 2, r, cond)["logvar"].isclose(base).any()
    assert not net(x, t, r / 2, cond)["logvar"].isclose(base).any()
    assert net(x + 1, t, r, None)["logvar"].equal(base)
