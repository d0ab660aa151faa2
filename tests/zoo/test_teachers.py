"""Teachers: no gradient, eval mode, the average's recursion, what must be attached."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.conformance.networks import Toy
from benchmarks.conformance.subject import random_batch
from registry import teachers
from registry.protocols import Teacher, required_heads
from zoo.objectives.decm import DECM
from zoo.objectives.dumo import DuMo
from zoo.objectives.shortcut import Shortcut
from zoo.teachers import Average, EmaTeacher, Frozen, Online, warmed_up, without_gradient

each = pytest.mark.parametrize("name", teachers.names())


class Small(nn.Module):
    """One layer with dropout and a buffer."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, t, r, cond=None):
        return {"u": self.dropout(self.linear(x))}


def point(n=4):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    return x, torch.ones(n), torch.zeros(n), None


def ready(name, network):
    teacher = teachers.get(name)()
    if teacher.needs_copy or teacher.distils:
        teacher.attach(network)
    return teacher


@each
def test_teacher_keeps_the_contract(name):
    teacher = teachers.get(name)()
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher.distils, bool)


@each
def test_targets_have_no_gradient_and_no_dropout(name):
    net = Small().train()
    with torch.no_grad():
        wanted = net.linear(point()[0])
    teacher = ready(name, copy.deepcopy(net))
    out = teacher(net)(*point())["u"]
    assert not out.requires_grad
    torch.testing.assert_close(out, wanted)
    assert net.training  # left as it was


@each
def test_network_in_training_keeps_its_gradient(name):
    net = Small()
    ready(name, copy.deepcopy(net))(net)(*point())
    out = net(*point())["u"]
    out.sum().backward()
    assert net.linear.weight.grad is not None


def test_network_is_left_in_training_mode_after_an_error():
    class Failing(Small):
        def forward(self, x, t, r, cond=None):
            raise RuntimeError("no")

    net = Failing().train()
    with pytest.raises(RuntimeError, match="no"):
        without_gradient(net)(*point())
    assert net.training


def test_network_in_eval_mode_stays_there():
    net = Small().eval()
    without_gradient(net)(*point())
    assert not net.training


def test_online_follows_the_network():
    net, teacher = Small(), Online()
    with torch.no_grad():
        net.linear.weight += 1
    torch.testing.assert_close(teacher(net)(*point())["u"], net.linear(point()[0]).detach())
    with pytest.raises(TypeError, match="no weights"):
        teacher.attach(net)


def test_ema_without_a_copy_is_the_network_itself():
    net = Small()
    out = EmaTeacher()(net)(*point())["u"]
    torch.testing.assert_close(out, net.linear(point()[0]).detach())


def test_ema_without_a_copy_is_refused_in_the_second_loss():
    """A first loss may be a trial of it; in the second the network has been trained."""
    net, teacher = Small(), EmaTeacher()
    teacher(net)(*point())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"teacher\.attach\(.* teacher\.update\(net, step\)"):
            teacher(net)
    teacher.attach(copy.deepcopy(net))
    teacher(net)(*point())
    teacher(net)(*point())


def test_ema_without_a_copy_serves_any_number_of_losses_that_train_nothing():
    net, teacher = Small(), EmaTeacher()
    with torch.no_grad():
        for _ in range(3):
            teacher(net)(*point())
    teacher(net)(*point())  # the first loss of a training


def test_ema_without_a_copy_cannot_be_updated():
    with pytest.raises(ValueError, match=r"teacher\.attach\("):
        EmaTeacher().update(Small(), 0)


@pytest.mark.parametrize("make", [DuMo, Shortcut, lambda: DECM(teacher=EmaTeacher(), n2n_every=1)])
def test_loop_that_forgets_the_teacher_ends_at_its_second_step(make):
    objective = make()
    net = Toy((2,), required_heads(objective))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step(number):
        batch, rng = random_batch(n=8, step=number), torch.Generator().manual_seed(number)
        objective.loss(net, batch, rng).per_sample.mean().backward()
        optimizer.step()

    step(0)
    with pytest.raises(ValueError, match=r"objective\.teacher"):
        step(1)


def test_ema_evaluates_its_copy():
    net, other, teacher = Small(), Small(seed=1), EmaTeacher()
    teacher.attach(other)
    out = teacher(net)(*point())["u"]
    torch.testing.assert_close(out, other.linear(point()[0]).detach())


@settings(max_examples=10, deadline=None)
@given(decay=st.floats(0, 0.999), steps=st.integers(1, 8))
def test_ema_is_the_recursion(decay, steps):
    """mean <- d mean + (1 - d) weight with the warmed-up decay, in float64 beside it."""
    net, teacher = Small(), EmaTeacher(decay=decay)
    teacher.attach(copy.deepcopy(net))
    mean = net.linear.weight.detach().double().clone()
    for step in range(steps):
        with torch.no_grad():
            net.linear.weight += 0.1 * (step + 1)
            net.count += 1
        teacher.update(net, step)
        d = min(decay, (1 + step) / (10 + step))
        mean = d * mean + (1 - d) * net.linear.weight.detach().double()
    torch.testing.assert_close(
        teacher.network.linear.weight.detach().double(), mean, rtol=1e-5, atol=1e-6
    )
    assert teacher.network.count == steps  # buffers are copied


def test_ema_follows_the_network_that_it_is_given():
    """Also where a second network is trained beside the same average."""
    teacher = EmaTeacher(decay=0.0)
    teacher.attach(Small())
    for net in (Small(seed=1), Small(seed=2)):
        teacher.update(net, 0)
        assert torch.equal(teacher.network.linear.weight, net.linear.weight)


def test_warm_up_starts_at_a_tenth_and_ends_at_the_decay():
    assert warmed_up(0.999, 0) == 0.1
    assert warmed_up(0.999, 10**6) == 0.999
    assert warmed_up(0.5, 100) == 0.5
    rising = [warmed_up(0.99, step) for step in range(50)]
    assert rising == sorted(rising)


def test_update_does_not_touch_the_network():
    net, mean = Small(), Small(seed=1)
    before = copy.deepcopy(net.state_dict())
    Average(mean, net).update(0.3)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_frozen_never_changes_and_has_no_trainable_weights():
    net, teacher = Small(), Frozen()
    teacher.attach(fixed := Small(seed=1))
    before = copy.deepcopy(fixed.state_dict())
    teacher.update(net, 5)
    assert all(torch.equal(before[key], value) for key, value in fixed.state_dict().items())
    assert not any(p.requires_grad for p in fixed.parameters())
    assert not fixed.training


def test_frozen_without_a_network_says_what_to_bind():
    with pytest.raises(ValueError, match=r"frozen.checkpoint .* frozen.pretrain"):
        Frozen()(Small())


def test_networks_are_no_part_of_what_is_compared_or_printed():
    one, other = EmaTeacher(), EmaTeacher()
    one.attach(Small())
    assert one == other
    assert repr(one) == repr(other) == "EmaTeacher(decay=0.999, dropout='off')"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmaTeacher(decay=1.0), "ema.decay"),
        (lambda: EmaTeacher(decay=-0.1), "ema.decay"),
        (lambda: Frozen(pretrain=1.0), "frozen.pretrain"),
        (lambda: Frozen(pretrain=-0.1), "frozen.pretrain"),
        (lambda: Frozen(checkpoint="runs/x", pretrain=0.5), "exclude each other"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
