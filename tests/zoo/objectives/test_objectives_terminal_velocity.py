"""Terminal velocity matching: its loss computed a second time, and its guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from objective_cases import CLOSE
from torch import nn

from benchmarks.conformance.networks import ExactNetwork, Toy
from benchmarks.conformance.subject import GAUSSIAN, law_batch, random_batch
from registry.protocols import NULL_LABEL
from zoo.guidance import UniformGuidance
from zoo.objectives.terminal_velocity import TerminalVelocity
from zoo.ops import like, normal_like
from zoo.oracles import exact_on
from zoo.paths import Linear
from zoo.points.velocities import FromTeacher, Own
from zoo.teachers import EmaTeacher, Frozen, Online
from zoo.times import LogitNormal, LogitNormalPair, StepAndEnd, UniformPair
from zoo.weighting import Unweighted

N = 24


class Told(nn.Module):
    """u = w raw, as with @scaled_by_guidance(), which keeps its calls."""

    def __init__(self, seed=0):
        super().__init__()
        self.toy, self.calls = Toy((2,), ("u",), seed=seed), []

    def forward(self, x, t, r, cond=None):
        self.calls.append((x, t, r, cond))
        raw = self.toy(x, t, r, cond)["u"]
        return {"u": raw * like(cond["guidance"][:, 0], raw) if "guidance" in cond else raw}


def loss_of(objective, net, n=N):
    batch = random_batch((2,), n, labels="given")
    return batch, objective.loss(net, batch, torch.Generator().manual_seed(0))


def second_opinion(net, teacher, batch, point, at_s, *, w_of_target=True, beta=True, held=False):
    """beta^2 || dX/ds - F_ema ||^2 + beta^2 || F - (w v_c + (1 - w) F_ema(null)) ||^2."""
    (x, t, r, cond), (x_s, s, _, _) = point, at_s
    t, r, s = t.double(), r.double(), s.double()
    x0, x1 = batch.x0, normal_like(batch.x0, torch.Generator().manual_seed(0))
    for at, time in ((x, t), (x_s, s)):  # one noise for both
        torch.testing.assert_close(at, like(1 - time, x0) * x0 + like(time, x0) * x1, **CLOSE)
    w = cond["guidance"][:, 0].double() if "guidance" in cond else torch.ones_like(t)
    null = {**cond, "label": torch.full_like(cond["label"], NULL_LABEL)}
    if "guidance" in cond:
        null["guidance"] = torch.tensor([1.0, 0.0, 1.0]).expand(len(t), 3)

    def X(r):
        u = net(x, t, r, cond)["u"]
        return x + like(r - t, x) * u

    end, moved = torch.func.jvp(X, (r,), (torch.ones_like(r),))
    moved = moved.detach() if held else moved
    terminal = moved - teacher(end, r, r, cond)["u"].detach()
    target = x1 - x0
    if w_of_target:
        target = like(w, x) * target + like(1 - w, x) * teacher(x_s, s, s, null)["u"].detach()
    matching = net(x_s, s, s, cond)["u"] - target
    return (terminal.square().mean(1) + matching.square().mean(1)) / (w**2 if beta else 1)


def gradient(net, per_sample):
    found = torch.autograd.grad(per_sample.sum(), list(net.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def both(guidance, **wrong):
    """The objective's losses and gradient, and those of a second opinion."""
    net, average = Told(), Told(seed=1)
    objective = TerminalVelocity(guidance=guidance, label_dropout=0.4)
    objective.teacher.attach(average)
    batch, out = loss_of(objective, net)
    again = second_opinion(net, average, batch, *net.calls[:2], **wrong)
    return out.per_sample, gradient(net, out.per_sample), again, gradient(net, again)


each_guidance = pytest.mark.parametrize(
    "guidance", [None, UniformGuidance(smallest=1.5, largest=3.0)], ids=["plain", "guided"]
)


@each_guidance
def test_loss_is_that_of_the_released_code(guidance):
    ours, slope, theirs, its_slope = both(guidance)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert float((slope - its_slope).norm() / slope.norm()) < 1e-5


@pytest.mark.parametrize(
    "wrong", [{"held": True}, {"beta": False}, {"w_of_target": False}], ids=str
)
def test_what_is_left_out_makes_another_gradient(wrong):
    """The negative controls of the test above."""
    _, slope, _, its_slope = both(UniformGuidance(smallest=1.5, largest=3.0), **wrong)
    assert float((slope - its_slope).norm() / slope.norm()) > 0.02


def test_rows_without_a_label_are_told_scale_one_in_every_call():
    net = Told()
    objective = TerminalVelocity(
        guidance=UniformGuidance(smallest=2.0, largest=2.0), teacher=Online(), label_dropout=0.4
    )
    loss_of(objective, net)
    assert len(net.calls) == 4
    for *_, cond in net.calls:
        scale = torch.where(cond["label"] == NULL_LABEL, 1.0, 2.0)
        assert torch.equal(cond["guidance"][:, 0], scale)
        assert (cond["guidance"][:, 1:] == torch.tensor([0.0, 1.0])).all()
    dropped = [int((cond["label"] == NULL_LABEL).sum()) for *_, cond in net.calls]
    assert 0 < dropped[0] < N
    assert sorted(dropped) == [dropped[0]] * 3 + [N]


def test_end_of_every_step_moves_with_the_flow_at_the_exact_map():
    network = ExactNetwork(exact_on(GAUSSIAN, Linear()), ("u",))
    objective = TerminalVelocity(teacher=Online())

    def residual(net):
        out = objective.loss(net, law_batch(GAUSSIAN, 64, 0), torch.Generator().manual_seed(0))
        return float(out.terms["map"].max()) ** 0.5

    assert residual(network) < 1e-5  # float32 times
    assert residual(lambda x, t, r, cond: network(x, t, t, cond)) > 0.1


def test_defaults_are_those_of_the_released_code():
    objective = TerminalVelocity()
    assert objective.times == StepAndEnd(length_mean=-0.8, length_std=1.0, r_mean=-0.4, r_std=1.0)
    assert objective.times_v == LogitNormal(mean=-0.4, std=1.0)
    assert objective.teacher == EmaTeacher(decay=0.99)
    assert objective.weight == Unweighted()


def test_other_laws_of_steps_serve_if_every_row_has_one():
    with pytest.raises(ValueError, match=r"terminal_velocity.times draws r = t in some rows"):
        TerminalVelocity(times=LogitNormalPair())
    pairs = replace(LogitNormalPair(), off_diagonal_fraction=1.0)
    _, out = loss_of(TerminalVelocity(times=pairs), Told())
    assert (out.r < out.t).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": UniformPair()}, "in every row"),
        ({"velocity": Own()}, "terminal_velocity does not have both"),
        ({"velocity": FromTeacher()}, r"Bind terminal_velocity.teacher = @frozen\(\)"),
        ({"teacher": Frozen()}, r"Bind terminal_velocity.velocity = @teacher\(\)"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TerminalVelocity(**settings)
