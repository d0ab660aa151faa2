"""Targets under the masks of the prediction: what is the same, and what is not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from backbone_cases import awake, inputs, small
from trainer_toys import ToyData, ToyNet, ToyObjective, run

from registry import teachers
from registry.protocols import Batch
from trainers.engines import TorchEngine, TrainStep
from trainers.optim import AdamW
from zoo.derivatives.methods import Dual, Jvp
from zoo.derivatives.one_pass import OnePass
from zoo.dropout import shared_dropout
from zoo.objectives.shortcut import Shortcut
from zoo.teachers import EmaTeacher, Online

each = pytest.mark.parametrize("name", teachers.names())
each_order = pytest.mark.parametrize("target_first", [False, True])


def network(backbone="dit", **fields):
    return awake(small(backbone, dropout=0.4, **fields)).train()


def made(name, net, **fields):
    teacher = teachers.get(name)(**fields)
    if name != "online":
        teacher.attach(copy.deepcopy(net).requires_grad_(False).eval())
    return teacher


def both(teacher, net, *, target_first, rows=slice(None), seed=0):
    """The prediction and the target at the same point, in one loss."""
    x, t, r, cond = inputs("dit")
    some = (x[rows], t[rows], r[rows], {"label": cond["label"][rows]})
    torch.manual_seed(seed)
    with shared_dropout():
        target = teacher(net)
        first = target(*some)["u"] if target_first else None
        prediction = net(x, t, r, cond)["u"]
        return prediction, target(*some)["u"] if first is None else first


@each
@each_order
def test_shared_target_equals_the_prediction_of_equal_weights(name, target_first):
    net = network()
    prediction, target = both(made(name, net, dropout="shared"), net, target_first=target_first)
    assert target.equal(prediction)
    assert not target.requires_grad
    assert net.training


@each
@each_order
def test_target_without_dropout_or_with_masks_of_its_own_is_another(name, target_first):
    net = network()
    prediction, off = both(made(name, net), net, target_first=target_first)
    assert off.equal(made(name, net, dropout="off")(net)(*inputs("dit"))["u"])
    assert not torch.allclose(off, prediction, rtol=0.05)
    own = net(*inputs("dit"))["u"]
    assert not torch.allclose(own, prediction, rtol=0.05)


@each
def test_target_leaves_the_generator_so_that_the_prediction_is_as_without_it(name):
    net = network()
    prediction, _ = both(made(name, net, dropout="shared"), net, target_first=True)
    point = inputs("dit")
    torch.manual_seed(0)
    assert net(*point)["u"].equal(prediction)


def test_every_call_of_the_loss_has_the_masks_of_the_first_prediction():
    net = network()
    x, t, r, cond = inputs("dit")
    teacher = made("online", net, dropout="shared")
    with shared_dropout():
        first, second = net(x, t, r, cond)["u"], net(x, t, r, cond)["u"]
        targets = [teacher(net)(x, t, r, cond)["u"] for _ in range(2)]
    assert all(target.equal(first) for target in targets)
    assert not targets[0].equal(second)


def test_fewer_rows_have_other_masks():
    """Stated in zoo/dropout.py: a generator draws for all rows of a layer, then for the next."""
    net = network()
    teacher = made("online", net, dropout="shared")
    prediction, target = both(teacher, net, target_first=False, rows=slice(2))
    assert not torch.allclose(target, prediction[:2], rtol=0.05)


def test_network_in_evaluation_has_targets_in_evaluation():
    net = network().eval()
    prediction, target = both(made("ema", net, dropout="shared"), net, target_first=False)
    torch.testing.assert_close(target, prediction)


@pytest.mark.parametrize("derivative", [OnePass(), Dual(), Jvp()], ids=repr)
def test_prediction_with_a_derivative_has_the_masks_too(derivative):
    net = network()
    x, t, r, cond = inputs("dit")
    tangents = (x, torch.ones_like(t), torch.zeros_like(r))
    with shared_dropout():
        take = derivative.with_graph if derivative.differentiable else derivative.with_value
        out, _ = take(lambda *at: net(*at, cond), (x, t, r), tangents, "u")
        target = made("online", net, dropout="shared")(net)(x, t, r, cond)["u"]
    torch.testing.assert_close(target, out["u"].detach())


def test_checkpointed_prediction_has_the_masks_and_recomputes_with_them():
    net, saving = network(), network(checkpointing=True)
    gradients = []
    for one in (net, saving):
        prediction, target = both(made("online", one, dropout="shared"), one, target_first=False)
        assert target.equal(prediction)
        (prediction - 0.5 * target).square().mean().backward()
        gradients.append([p.grad for p in one.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_where_a_loss_begins_must_be_known_if_masks_are_drawn():
    net, point = network(), inputs("dit")
    teacher = made("online", net, dropout="shared")
    with pytest.raises(ValueError, match=r"with shared_dropout\(\):` of zoo.dropout"):
        teacher(net)(*point)
    plain = awake(small("dit")).train()  # nothing is drawn
    torch.testing.assert_close(teacher(plain)(*point)["u"], plain(*point)["u"].detach())


def test_the_trainer_says_where_each_share_begins():
    """With equal weights the pull of the toy towards its teacher is zero under shared masks."""
    net = ToyNet(dropout=0.5)
    gaps = {}
    for dropout in ("off", "shared"):
        objective = ToyObjective(teacher=EmaTeacher(dropout=dropout))
        engine = TorchEngine(gradient_accumulation_steps=2)
        engine.prepare(TrainStep(copy.deepcopy(net), objective), AdamW(), torch.device("cpu"), 8)
        batch = Batch(*ToyData().batch(0, 8, 0))
        torch.manual_seed(0)
        outs = [engine(s, torch.Generator().manual_seed(1)) for s in engine.shares(batch)]
        gaps[dropout] = [float(out.diagnostics["gap"].sum()) for out in outs]
    assert gaps["shared"] == [0, 0]
    assert min(gaps["off"]) > 1e-3


def test_training_with_shared_dropout_resumes_bit_equal(tmp_path):
    from trainer_toys import StopAt

    from trainers import Budget, CheckpointCallback

    def objective():
        return ToyObjective(teacher=EmaTeacher(decay=0.9, dropout="shared"))

    _, whole = run(objective=objective(), budget=Budget(steps=8))
    _, off = run(budget=Budget(steps=8))
    saving = [CheckpointCallback(every=3, keep=9), StopAt(5)]
    run(objective=objective(), budget=Budget(steps=8), folder=tmp_path, callbacks=saving)
    _, rest = run(objective=objective(), budget=Budget(steps=8), folder=tmp_path, resume=True)
    assert 0 < len(rest) < len(whole)
    assert all(a.equal(b) for a, b in zip(rest, whole[-len(rest) :], strict=True))
    assert not whole[-1].equal(off[-1])


@each
def test_other_words_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}.dropout = 'on'; allowed: 'off', 'shared'"):
        teachers.get(name)(dropout="on")


def test_shortcut_whose_targets_are_fewer_refuses_it():
    with pytest.raises(ValueError, match="targets for some of its rows alone"):
        Shortcut(teacher=EmaTeacher(dropout="shared"))
    assert replace(Shortcut(), teacher=Online()).teacher.dropout == "off"
