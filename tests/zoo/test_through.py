"""Teachers that a gradient passes: to the inputs, and to no weight."""

from __future__ import annotations

import copy

import pytest
import torch
from backbone_cases import awake, inputs, small
from torch.func import functional_call

from registry import teachers
from registry.protocols import TransparentTeacher
from zoo.dropout import shared_dropout

each = pytest.mark.parametrize("name", teachers.names())
each_saving = pytest.mark.parametrize("checkpointing", [False, True])


def made(name, net, **fields):
    teacher = teachers.get(name)(**fields)
    if name != "online":
        teacher.attach(copy.deepcopy(net))
    return teacher


def to_x(network, net):
    """The gradient by x of a loss that has the network twice: through the teacher, and itself."""
    x, t, r, cond = inputs("dit")
    x.requires_grad_()
    net.zero_grad()
    loss = (network(x, t, r, cond)["u"].square().mean()) + net(x.detach(), t, r, cond)["u"].mean()
    loss.backward()
    return x.grad, [p.grad for p in net.parameters()]


@each
@each_saving
def test_gradient_to_the_input_is_that_of_the_weights_held_fixed(name, checkpointing):
    net = awake(small("dit", checkpointing=checkpointing)).train()
    teacher = made(name, net)
    assert isinstance(teacher, TransparentTeacher)
    fixed = {key: value.detach() for key, value in net.state_dict().items()}
    plain = awake(small("dit")).eval()

    def held(*at):
        return functional_call(plain, fixed, at)

    expected, of_net = to_x(held, copy.deepcopy(plain).train())
    found, gradients = to_x(teacher.through(net), net)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients, of_net, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(p.requires_grad for p in net.parameters())
    assert net.training


def test_a_teacher_behind_a_stop_gradient_gives_none_to_the_input():
    net = awake(small("dit")).train()
    x = inputs("dit")[0].requires_grad_()
    assert not made("online", net)(net)(x, *inputs("dit")[1:])["u"].requires_grad


@each
@each_saving
def test_shared_masks_hold_in_the_backward_too(name, checkpointing):
    """Differences in float64 under the same seed, the masks of a CPU being those of float32."""
    net = awake(small("dit", dropout=0.4, checkpointing=checkpointing)).double().train()
    teacher = made(name, net, dropout="shared")
    x, t, r, cond = inputs("dit", dtype=torch.float64)
    v = torch.randn_like(x)

    def number(x):
        torch.manual_seed(3)
        with shared_dropout():
            return teacher.through(net)(x, t, r, cond)["u"].square().sum()

    moved = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(number(moved), moved)
    with torch.no_grad():
        expected = (number(x + 1e-5 * v) - number(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close((found * v).sum(), expected, rtol=1e-6, atol=1e-6)


def test_autocast_cache_does_not_lead_the_gradient_to_the_weights():
    net = awake(small("mlp")).train()
    x, t, r, cond = inputs("mlp")
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # its cache enabled
        net(x.detach(), t, r, cond)
        out = made("online", net).through(net)(x, t, r, cond)["u"]
    out.sum().backward()
    assert x.grad.any()
    assert all(p.grad is None for p in net.parameters())
